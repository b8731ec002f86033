"""Compiled layers: the same results as without, in few graphs, with nothing of the cache's size allocated."""

import pickle
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from support.compiler import needs_compiler
from support.models import greedy, loaded, prompts_of, relative_error, tiny_model
from vattention import LLM, SamplingParams
from vattention.attention import native
from vattention.engine import compiled, linears

PROMPTS = prompts_of(1, 7, 40, 90)
PARAMS = SamplingParams(temperature=0, max_tokens=10)
OPTIONS: dict[str, Any] = {"kv_cache_memory": "64MiB", "max_model_len": 128, "max_num_batched_tokens": 64}


def tokens(llm: LLM, prompts: list[tuple[int, ...]] = PROMPTS) -> list[tuple[int, ...]]:
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [tuple(o.outputs[0].token_ids) for o in llm.generate(given, PARAMS, use_tqdm=False)]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Whatever cannot be compiled is an error, unless a test says otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


@needs_compiler
@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gemma2",  # soft caps, and two kinds of layers
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "qwen3", "phi3", "gpt_neox", "olmo2")),
    ],
)
def test_the_tokens_are_those_of_transformers(model_type: str) -> None:
    model = tiny_model(model_type)
    expected = [greedy(model, prompt, PARAMS.max_tokens or 0) for prompt in PROMPTS]
    with LLM(loaded(model), compile=True, guard=True, poison=True, page_size="4KiB", **OPTIONS) as llm:
        llm.warmup()
        assert compiled.compile_model(model).ready
        assert tokens(llm) == expected


@needs_compiler
def test_two_graphs_serve_passes_of_every_shape() -> None:
    model = tiny_model("llama")
    counters.clear()
    with LLM(loaded(model), compile=True, **OPTIONS) as llm:
        llm.warmup()
        assert counters["stats"]["unique_graphs"] == 2  # for three layers
        tokens(llm)
        tokens(llm, PROMPTS[:1])
        tokens(llm, PROMPTS[2:])
        assert counters["stats"]["unique_graphs"] == 2
    with LLM(loaded(model), compile=True, **OPTIONS) as llm:  # the same weights: nothing to do
        llm.warmup()
        assert counters["stats"]["unique_graphs"] == 2


@needs_compiler
def test_passes_run_as_they_are_until_all_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, go = tiny_model("llama"), threading.Event()
    prepare, passes = compiled.CompiledModel._prepare, []
    run = compiled.CompiledModel.run
    monkeypatch.setattr(compiled.CompiledModel, "_prepare", lambda self, model: go.wait(60) and prepare(self, model))
    monkeypatch.setattr(compiled.CompiledModel, "run", lambda *a, **k: passes.append(1) or run(*a, **k))
    with LLM(loaded(model), compile=True, **OPTIONS) as llm:
        before = tokens(llm)
        assert not passes
        go.set()
        llm.warmup()
        assert passes
        assert tokens(llm) == before


@needs_compiler
def test_who_shares_the_weights_does_not_notice() -> None:
    model = loaded(tiny_model("llama").bfloat16())
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=5)

    def answers(llm: LLM) -> list[Any]:
        return [o.outputs[0].logprobs for o in llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)]

    with LLM(model, **OPTIONS) as plain:
        before = answers(plain)
        with LLM(model, compile=True, **OPTIONS) as llm:
            llm.warmup()
            answers(llm)
            assert answers(plain) == before  # to the last bit


@needs_compiler
def test_left_to_itself_it_is_compiled_by_warmup() -> None:
    model = tiny_model("llama")
    with LLM(loaded(model), **OPTIONS) as llm:
        before = tokens(llm)
        assert model not in compiled._models
        llm.engine.warmup(wait=False)
        assert tokens(llm) == before  # while it is being compiled
        llm.warmup()
        assert compiled._models[model].ready
        assert tokens(llm) == before
    never = tiny_model("llama")
    with LLM(loaded(never), compile=False, **OPTIONS) as llm:
        llm.warmup()
        assert never not in compiled._models


@needs_compiler
def test_layers_are_called_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not through the front door of torch.compile, whose checks take longer than small layers do."""
    model = tiny_model("llama")
    expected = [greedy(model, prompt, PARAMS.max_tokens or 0) for prompt in PROMPTS]
    with LLM(loaded(model), compile=True, **OPTIONS) as llm:
        llm.warmup()
        layer = compiled.decoder_layers(model)[0]
        shortcut = layer._compiled_call_impl.__closure__  # type: ignore[union-attr]
        found = [cell.cell_contents for cell in shortcut if isinstance(cell.cell_contents, compiled.Shortcut)]
        assert [sorted(route.rows) != [] for one, route in sorted(found[0]._routes.items())] == [True, False]
        monkeypatch.setattr(found[0], "_door", None)
        assert tokens(llm) == expected


def test_without_a_compiler_the_results_are_the_same_after_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    expected = [greedy(model, prompt, PARAMS.max_tokens or 0) for prompt in PROMPTS]
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr(native, "_warned", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LLM(loaded(model), compile=True, **OPTIONS) as llm:
            llm.warmup()
            assert tokens(llm) == expected
        with LLM(loaded(model), compile=True, **OPTIONS) as llm:
            llm.warmup()
    assert ["no C++ compiler" in str(w.message) for w in caught if w.category is RuntimeWarning] == [True]


@needs_compiler
def test_a_layer_that_cannot_be_compiled_runs_as_it_is_after_one_warning() -> None:
    model = tiny_model("llama")
    expected = [greedy(model, prompt, PARAMS.max_tokens or 0) for prompt in PROMPTS]
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) if float(x.sum()) < 1e30 else x  # what it does depends on the data
    with LLM(loaded(model), compile=True, **OPTIONS) as llm:
        with pytest.warns(RuntimeWarning, match="runs uncompiled"):
            llm.warmup()
        assert tokens(llm) == expected


@needs_compiler
def test_a_compiler_that_fails_later_costs_nothing_but_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **inputs: Any) -> Any:
        raise TorchDynamoException("one graph too many")

    model = tiny_model("llama")
    expected = [greedy(model, prompt, PARAMS.max_tokens or 0) for prompt in PROMPTS]
    with LLM(loaded(model), compile=True, **OPTIONS) as llm:
        llm.warmup()
        monkeypatch.setattr(compiled.CompiledModel, "_forward", fail)
        with pytest.warns(RuntimeWarning, match="runs uncompiled"):
            assert tokens(llm) == expected


@needs_compiler
def test_nothing_of_the_size_of_the_cache_is_allocated() -> None:
    def largest(act: Any) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            act()
        return max(event.cpu_memory_usage for event in profile.events())

    model = tiny_model("llama")
    with LLM(loaded(model), compile=True, max_num_seqs=64, kv_cache_memory="64MiB", max_model_len=256) as llm:
        llm.warmup()
        keys = llm.engine._runner._layers[0][0]
        assert largest(keys.clone) >= keys.nbytes  # seen if it happens
        assert largest(lambda: tokens(llm)) < keys.nbytes / 4


@needs_compiler
def test_bfloat16_is_as_close_to_float32_as_without() -> None:
    reference = tiny_model("llama", hidden_size=96, intermediate_size=128)
    half = tiny_model("llama", hidden_size=96, intermediate_size=128).bfloat16()
    ids = torch.tensor([prompts_of(90)[0]])
    with torch.inference_mode():
        expected = reference(ids).logits[0, :-1]
        theirs = half(ids).logits[0, :-1].float()
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(loaded(half), compile=True, max_num_batched_tokens=128, max_num_seqs=4, max_model_len=128) as llm:
        llm.warmup()
        rows = []
        forward = llm.engine._runner.forward
        llm.engine._runner.forward = lambda chunks: rows.append(forward(chunks)) or rows[-1]  # type: ignore[method-assign]
        llm.generate([{"prompt_token_ids": ids[0].tolist()}], params, use_tqdm=False)
    ours = rows[-1][:-1].float()
    assert relative_error(ours, expected) < 1.2 * relative_error(theirs, expected)


class _Siblings(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(32, n, bias=False) for n in (32, 16, 16))
        self.gate, self.up = (torch.nn.Linear(32, 48) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [layer(x).view(1, -1, 16).sum(1) for layer in (self.q, self.k, self.v)]
        return torch.cat([*heads, (self.gate(x) * self.up(x)).view(1, -1, 16).sum(1)])


@needs_compiler
@pytest.mark.skipif(not linears.can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="no bfloat16 in oneDNN")
def test_layers_that_share_an_input_become_one() -> None:
    module = _Siblings().bfloat16().requires_grad_(False)
    x = torch.randn(1, 5, 32).bfloat16()
    layers: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        linears.merge_linears(graph)
        layers.extend(len(node.args[1]) for node in graph.graph.nodes if "linears" in str(node.target))
        return graph.forward

    got = torch.compile(module, backend=backend, fullgraph=True)(x)
    assert sorted(layers) == [2, 3]
    torch.testing.assert_close(got, module(x), rtol=2e-2, atol=2e-2)


@needs_compiler
def test_a_model_that_has_run_compiled_can_be_pickled() -> None:
    model = tiny_model("llama").bfloat16()
    with LLM(loaded(model), dtype="bfloat16", compile=True, **OPTIONS) as llm:
        llm.warmup()
        expected = tokens(llm)
    again = pickle.loads(pickle.dumps(model))
    with LLM(loaded(again), dtype="bfloat16", compile=False, **OPTIONS) as llm:
        assert len(tokens(llm)) == len(expected)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))


@needs_compiler
@pytest.mark.skipif(not linears.can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="no bfloat16 in oneDNN")
def test_without_memory_for_packed_weights_nothing_is_packed_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").bfloat16()
    weights = sum(part.weight.nbytes for part in model.modules() if isinstance(part, torch.nn.Linear))
    monkeypatch.setattr(linears, "memory_headroom", lambda: 2 * weights - 1)
    with LLM(loaded(model), dtype="bfloat16", compile=True, **OPTIONS) as llm:
        with pytest.warns(RuntimeWarning, match="linear layers run from the weights as they are"):
            llm.warmup()
        tokens(llm)  # any other warning is an error
    assert not any(hasattr(weight, linears._PACKED) for weight in model.parameters())
    monkeypatch.setattr(linears, "memory_headroom", lambda: 2 * weights)
    assert linears.has_room(model)

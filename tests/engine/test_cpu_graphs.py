"""Decode passes on a CPU made again from what was written down: the tokens of compiled passes."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.compiler import needs_compiler
from support.graphs import all_tokens, decodes, graphs_of
from support.models import engine_for, loaded, prompts_of, run, tiny_model
from vattention import LLM, SamplingParams
from vattention.attention import recording
from vattention.attention.base import Features
from vattention.cache import KVCache
from vattention.engine import cpu_recorder
from vattention.engine.compiled import compile_model
from vattention.engine.cpu_graphs import MOST_ROWS, CannotRecord, CpuCapture
from vattention.engine.cpu_memory import Memory
from vattention.engine.engine import Engine
from vattention.engine.graphs import Captured
from vattention.engine.loading import LoadedModel
from vattention.engine.runner import Runner

pytestmark = needs_compiler
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PAGES: dict[str, Any] = {"page_size": "4KiB", "poison": True, "guard": True}
"""Small pages, so that requests of some hundred tokens grow over many; what is past the lengths is NaN."""


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model().bfloat16())


class Counting(CpuCapture):
    """Counts replays."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        captured = super().__call__(work)

        def replay() -> None:
            self.replays += 1
            captured.replay()

        return Captured(replay, captured.output)


def recorded(model: LoadedModel, *, record: bool = True, **options: Any) -> Engine:
    """An engine of compiled layers, whose decode passes are recorded."""
    compile_model(model.model).wait()
    given = options if options.get("cache") == "paged" else {**PAGES, **options}
    engine = engine_for(model, **given)
    recorder: Any = engine._runner
    recorder.runner = Runner(model.model, engine._cache, compile=True, record=record)
    if record:
        graphs_of(engine)._capture = Counting()
    return engine


def replays(engine: Engine) -> int:
    capture: Any = graphs_of(engine)._capture
    return capture.replays


def both(model: LoadedModel, act: Callable[[Engine], Any], **options: Any) -> tuple[Any, Any, Engine]:
    """What `act` returns without and with recording, and the engine of the latter."""
    engine = recorded(model, **options)
    return act(recorded(model, record=False, **options)), act(engine), engine


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_major": True},
        {"layers_per_stream": None, "kv_together": True},
        {"cache": "paged", "memory": "4MiB"},
        {"cache": "paged", "memory": "4MiB", "block_size": 5},
    ],
    ids=["token", "head", "all", "paged", "paged-5"],
)
def test_tokens_and_which_passes_are_replayed(model: LoadedModel, options: dict[str, Any]) -> None:
    """Prompts in chunks beside decodes, requests that come and go, growth over pages."""
    prompts = prompts_of(1, 17, 64, 100, 33, 5, 150)
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (30, 3, 12, 40, 7, 25, 60)]
    expected, tokens, engine = both(
        model, lambda engine: all_tokens(run(engine, prompts, params)), max_num_batched_tokens=40, **options
    )
    assert tokens == expected
    assert set(graphs_of(engine).captured) <= {1, 2, 3, 4}
    assert replays(engine) == decodes(engine) > 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    "model_type",
    [
        *("gemma2", "gpt_oss"),  # soft caps, windows, sinks
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "llama",
                "mistral",
                "qwen3",
                "phi3",
                "gpt_neox",
                "olmo2",
                "gpt2",
                "mixtral",
                "granite",
                "falcon",
            )
        ),
    ],
)
def test_other_types_of_models(model_type: str, dtype: torch.dtype) -> None:
    model = loaded(tiny_model(model_type).to(dtype))
    expected, tokens, engine = both(
        model,
        lambda engine: all_tokens(run(engine, prompts_of(17, 33, 40), SamplingParams(temperature=0, max_tokens=30))),
    )
    assert tokens == expected
    assert compile_model(model.model).ready
    assert replays(engine) == decodes(engine) > 20


def test_samples_that_share_a_prompt_and_then_part(model: LoadedModel) -> None:
    """Forks: pages shared behind one address, and replaced by copies behind it before a replay writes there."""
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=40)
    expected, tokens, engine = both(model, lambda engine: all_tokens(run(engine, prompts_of(100), params)))
    assert tokens == expected
    assert len(set(tokens)) == 3
    assert graphs_of(engine).captured == (3,)
    assert isinstance(engine._cache, KVCache)
    assert engine._cache.stats().copied > 0


def test_preemption_and_seeds(model: LoadedModel) -> None:
    """Pages taken from one slot and given to another, under a budget that does not hold all."""
    params = [SamplingParams(temperature=0.8, seed=n, max_tokens=90) for n in range(4)]
    requests: list[Any] = []

    def act(engine: Engine) -> Any:
        requests[:] = run(engine, prompts_of(60, 61, 62, 63), params)
        return all_tokens(requests)

    expected, tokens, engine = both(model, act, memory="72KiB")
    assert sum(request.preemptions for request in requests) > 0
    assert tokens == expected
    assert replays(engine) == decodes(engine) > 0


def test_more_rows_than_are_recorded(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_ROWS == 32
    monkeypatch.setattr("vattention.engine.runner.MOST_ROWS", 2)
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (12, 30, 20, 40)]
    expected, tokens, engine = both(model, lambda engine: all_tokens(run(engine, prompts_of(3, 9, 4, 5), params)))
    assert tokens == expected
    assert graphs_of(engine).captured == (1, 2)
    assert 0 < replays(engine) < decodes(engine)


def test_warming_up_records_all(model: LoadedModel) -> None:
    engine = recorded(model, max_num_seqs=6)
    engine.warmup()
    assert graphs_of(engine).captured == (1, 2, 3, 4, 5, 6)
    assert replays(engine) == 0
    run(engine, prompts_of(5, 40, 3), GREEDY)
    assert replays(engine) == decodes(engine) > 0


def test_nothing_is_recorded_before_the_model_is_compiled() -> None:
    with LLM(loaded(tiny_model()), kv_cache_memory="64MiB", max_model_len=128) as llm:
        runner: Any = llm.engine._runner
        prompt: Any = {"prompt_token_ids": [1, 2, 3]}
        eager = llm.generate([prompt], GREEDY, use_tqdm=False)
        assert runner.graphs.captured == ()
        llm.warmup()
        assert runner.graphs.captured == runner.graphs.buckets
        again = llm.generate([prompt], GREEDY, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in eager]


@pytest.mark.parametrize("options", [{"compile": False}, {"cuda_graphs": False}, {"attention_kernel": "sdpa"}])
def test_options_that_leave_it_out(options: dict[str, Any]) -> None:
    with LLM(loaded(tiny_model()), kv_cache_memory="64MiB", max_model_len=128, **options) as llm:
        runner: Any = llm.engine._runner
        assert runner.graphs is None


def test_a_pass_uses_the_same_memory_layer_after_layer() -> None:
    def memory_of(layers: int) -> int:
        model = loaded(tiny_model(num_hidden_layers=layers).bfloat16())
        before = {id(each) for each in gc.get_objects() if type(each) is Memory}
        engine = recorded(model, max_num_seqs=1)
        engine.warmup()
        assert graphs_of(engine).captured == (1,)
        (own,) = (each for each in gc.get_objects() if type(each) is Memory and id(each) not in before)
        return sum(map(len, own._blocks))

    assert memory_of(2) == memory_of(6)


def test_memory_comes_back_with_the_last_tensor_over_it() -> None:
    memory = Memory()
    first = memory.empty((2, 3), (3, 1), torch.float32)
    view, address = first[1], first.data_ptr()
    assert address % 64 == 0
    del first
    assert memory.empty((6,), (1,), torch.float32).data_ptr() != address, "a view is left"
    del view
    assert memory.empty((3, 2), (2, 1), torch.float32).data_ptr() == address


def test_another_thread_is_neither_recorded_nor_disturbed(model: LoadedModel) -> None:
    """Somebody decodes with the same compiled code while a pass is being recorded."""
    expected = all_tokens(run(recorded(model, record=False), prompts_of(9, 40), GREEDY))
    found: list[Any] = []
    other = recorded(model, record=False)
    engine = recorded(model)
    capture = graphs_of(engine)._capture

    def watched(work: Callable[[], torch.Tensor]) -> Captured:
        def beside() -> torch.Tensor:
            thread = threading.Thread(target=lambda: found.append(all_tokens(run(other, prompts_of(9, 40), GREEDY))))
            thread.start()
            thread.join()
            return work()

        return capture(beside)

    graphs_of(engine)._capture = watched
    assert all_tokens(run(engine, prompts_of(9, 40), GREEDY)) == expected
    assert found
    assert all(tokens == expected for tokens in found)


# -- what cannot be


def test_a_model_that_asks_for_numbers_is_not_recorded(recwarn: pytest.WarningsRecorder) -> None:
    tiny = tiny_model()
    model = loaded(tiny)
    forward = tiny.model.norm.forward
    tiny.model.norm.forward = lambda x: forward(x) if float(x.sum()) < 1e30 else x
    expected, tokens, engine = both(model, lambda engine: all_tokens(run(engine, prompts_of(5, 40, 7), GREEDY)))
    assert tokens == expected
    assert graphs_of(engine).captured == ()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("hidden", ["a call of ours", "a generated function", "an operator"])
def test_a_call_that_nobody_has_seen_is_found_out(
    model: LoadedModel, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = cpu_recorder.Recorder
    if hidden == "a call of ours":
        monkeypatch.setattr(recorder, "note", lambda *_: None)
    elif hidden == "a generated function":
        monkeypatch.setattr(recorder, "_watch", lambda *_: None)
    else:
        real = recorder.__torch_dispatch__

        def dispatch(self: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.cos.default:
                return function(*args, **(kwargs or {}))
            return real(self, function, types, args, kwargs)

        monkeypatch.setattr(recorder, "__torch_dispatch__", dispatch)
    tokens = all_tokens(run(recorded(model, record=False), prompts_of(5, 40), GREEDY))
    engine = recorded(model)
    assert all_tokens(run(engine, prompts_of(5, 40), GREEDY)) == tokens
    assert graphs_of(engine).captured == ()


def test_attention_that_the_kernel_does_not_compute_is_not_recorded(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vattention.attention.cpu_decode.can", lambda *_, **__: False)
    expected, tokens, engine = both(model, lambda engine: all_tokens(run(engine, prompts_of(5, 40), GREEDY)))
    assert tokens == expected
    assert graphs_of(engine).captured == ()


def test_a_call_is_noted_with_what_it_was_given() -> None:
    class Argument(ctypes.Structure):
        _fields_ = (("value", ctypes.c_int64),)

    seen: list[Any] = []

    class Notes:
        def note(self, function: Any, argument: ctypes.Structure, kept: tuple[Any, ...]) -> None:
            seen.append((function, argument.value, kept))

    calls: list[Any] = []
    with recording.to(Notes()):
        recording.call(calls.append, Argument(3), "kept")
        with pytest.raises(CannotRecord, match="why"):
            recording.refuse("why")
    recording.call(calls.append, Argument(4))
    recording.refuse("nobody records")
    assert len(calls) == 2
    assert seen == [(calls.append, 3, ("kept",))]


def test_attention_whose_lengths_change_in_place() -> None:
    """Room is made for the longest from the start."""
    from vattention.attention import choose

    keys, values = torch.randn(2, 3, 700, 2, 16)
    plan = choose.cpu_plan(2, bound=700, dtype=torch.float32, device=torch.device("cpu"))
    query = torch.randn(4, 2, 16)
    for slots, lengths in (((0, 1), (1, 1)), ((2, 0), (700, 300)), ((1, 1), (5, 5))):
        plan.update(slots, lengths)
        got = plan.attend(query, keys, values, Features())
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            k, v = (x[slot, :length].transpose(0, 1).repeat_interleave(2, 0) for x in (keys, values))
            expected = torch.nn.functional.scaled_dot_product_attention(query[:, row, None], k, v)[:, 0]
            torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-4)

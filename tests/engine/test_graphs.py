"""Decode passes replayed from graphs: the tokens of eager passes, whatever happens between the replays.

On a stand-in for CUDA graphs that runs the captured operators on the captured addresses (`support.graphs`); the real
ones are in tests/gpu/test_graphs.py.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.flash import FlashOnACPU
from support.graphs import CannotBeCaptured, CaptureOnACPU, all_tokens, decodes, graphs_of, plan_on_a_cpu
from support.models import engine_for, loaded, prompts_of, run, tiny_model
from vattention import SamplingParams
from vattention.attention.base import Features
from vattention.attention.decode_batch import DecodeBatch
from vattention.attention.decode_plan import DecodePlan, DecodeRows
from vattention.attention.varlen import decode
from vattention.cache import KVCache, PagedKVCache
from vattention.engine import compiled
from vattention.engine.architectures import ACCEPTED
from vattention.engine.engine import Engine
from vattention.engine.graphs import MOST_ROWS, Captured, CudaCapture, buckets
from vattention.engine.loading import LoadedModel
from vattention.engine.runner import Runner, _Streams
from vattention.errors import InvalidRequest

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PAGES: dict[str, Any] = {"page_size": "4KiB", "poison": True, "guard": True}
"""Small pages, so that requests of some hundred tokens grow over many; what is past the lengths is NaN."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A pass that cannot be captured is an error, unless a test says otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


def graphed(model: LoadedModel, capture: Any | None = None, *, compile: bool = False, **options: Any) -> Engine:
    """An engine whose decode passes are captured, by the stand-in unless said otherwise."""
    engine = engine_for(model, **{**PAGES, **options})
    recorder: Any = engine._runner
    capture = CaptureOnACPU() if capture is None else capture
    recorder.runner = Runner(model.model, engine._cache, capture=capture, plan=plan_on_a_cpu, compile=compile)
    return engine


def recordings(engine: Engine) -> list[Any]:
    capture: Any = graphs_of(engine)._capture
    return capture.recordings


def replays(engine: Engine) -> int:
    return sum(recording.replays for recording in recordings(engine))


def both(model: LoadedModel, act: Callable[[Engine], Any], **options: Any) -> tuple[Any, Any, Engine]:
    """What `act` returns for an eager engine and for one with graphs, and the latter."""
    engine = graphed(model, **options)
    return act(engine_for(model, **{**PAGES, **options})), act(engine), engine


# -- the same tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"head_major": True}, {"layers_per_stream": None, "kv_together": True}],
    ids=["token", "head", "all"],
)
def test_tokens_logits_and_which_passes_are_replayed(model: LoadedModel, options: dict[str, Any]) -> None:
    """Prompts in chunks beside decodes, requests that come and go, growth over pages."""
    prompts = prompts_of(1, 17, 64, 100, 33, 5, 150)
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (30, 3, 12, 40, 7, 25, 60)]
    expected, tokens, engine = both(
        model, lambda engine: all_tokens(run(engine, prompts, params)), max_num_batched_tokens=40, **options
    )
    assert tokens == expected
    assert graphs_of(engine).captured == (1, 2, 4)
    runner: Any = engine._runner
    assert replays(engine) == decodes(engine) > 50
    assert len(runner.passes) > decodes(engine), "passes with prompts run as they are"
    assert engine._cache.stats().mapped >= engine._cache.stats().needed


@pytest.mark.parametrize(
    "model_type",
    [
        *("mistral", "gemma2", "gpt_oss", "minicpm3", "mixtral", "gpt2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(ACCEPTED) if name != "longcat_flash"),
    ],
)
def test_every_type_of_model_can_be_captured(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    expected, tokens, engine = both(
        loaded(tiny_model(model_type)),
        lambda engine: all_tokens(run(engine, prompts_of(17, 33, 40), SamplingParams(temperature=0, max_tokens=8))),
    )
    assert tokens == expected
    assert replays(engine) == decodes(engine) > 0


def test_samples_that_share_a_prompt_and_then_part(model: LoadedModel) -> None:
    """Forks: pages shared behind one address, and replaced by copies behind it before a replay writes there."""
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=40)
    expected, tokens, engine = both(model, lambda engine: all_tokens(run(engine, prompts_of(100), params)))
    assert tokens == expected
    assert len(set(tokens)) == 3
    assert graphs_of(engine).captured == (4,), "three samples, and a row of padding"
    assert engine._cache.stats().copied > 0


def test_preemption_and_seeds(model: LoadedModel) -> None:
    """Pages taken from one slot and given to another, under a budget that does not hold all."""
    params = [SamplingParams(temperature=0.8, seed=n, max_tokens=60) for n in range(4)]
    small = {"page_size": "4KiB", "memory": "144KiB", "max_num_batched_tokens": 64}
    requests: list[Any] = []

    def act(engine: Engine) -> Any:
        requests[:] = run(engine, prompts_of(60, 61, 62, 63), params)
        return all_tokens(requests)

    expected, tokens, engine = both(model, act, **small)
    assert sum(request.preemptions for request in requests) > 0
    assert tokens == expected
    assert replays(engine) == decodes(engine) > 0


def test_a_request_that_outgrows_the_budget_ends_and_the_others_go_on(model: LoadedModel) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (150, 100)]

    def act(engine: Engine) -> Any:
        requests = run(engine, prompts_of(100, 60), params)
        return all_tokens(requests), [request.finish_reason for request in requests]

    (expected, why), (tokens, reasons), engine = both(model, act, memory="72KiB")
    assert tokens == expected
    assert reasons == why
    assert len(tokens[0]) < 100 == len(tokens[1]), "192 tokens fit in all"
    assert replays(engine) > 30


def test_memory_given_back_between_replays_and_mapped_anew(model: LoadedModel) -> None:
    engine = graphed(model)
    first = all_tokens(run(engine, prompts_of(100, 40), GREEDY))
    engine._cache.trim()
    assert engine._cache.stats().created == 0
    captured = len(recordings(engine))
    assert all_tokens(run(engine, prompts_of(100, 40), GREEDY)) == first
    assert len(recordings(engine)) == captured


def test_log_probabilities_of_a_prompt_of_one_row_and_passes_without_any(model: LoadedModel) -> None:
    """Chunks of one row: some want their logits for the prompt, and those in the middle of a prompt want none."""
    params = [SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=2), GREEDY]

    def act(engine: Engine) -> Any:
        requests = run(engine, prompts_of(5, 9), params)
        entries = [entry for entry in requests[0].prompt_logprobs if entry is not None]
        return all_tokens(requests), [round(each.logprob, 3) for entry in entries for each in entry.values()]

    expected, got, engine = both(model, act, max_num_batched_tokens=2, max_num_seqs=2)
    assert got == expected
    assert replays(engine) == decodes(engine) > 9


def test_growth_in_the_background_beside_replays(model: LoadedModel) -> None:
    """The engine maps the next pass's pages while one is computed: replays see every one."""
    engine = graphed(model, page_size="4KiB")
    run(engine, prompts_of(20), SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    calls = engine._cache.stats().driver_calls
    assert calls["map"] > 12, "every stream has grown"
    assert engine._cache.stats().prefetch_failures == 0


# -- when


def test_warming_up_captures_all_and_a_first_pass_only_its_own(model: LoadedModel) -> None:
    engine = graphed(model, max_num_seqs=6)
    run(engine, prompts_of(5), GREEDY)
    assert graphs_of(engine).captured == (1,)
    engine.warmup()
    assert graphs_of(engine).captured == graphs_of(engine).buckets == (1, 2, 4, 6)
    assert [recording.replays for recording in recordings(engine)] == [11, 0, 0, 0]
    engine.warmup()
    assert len(recordings(engine)) == 4
    assert all_tokens(run(engine, prompts_of(5, 40, 3), GREEDY)) == all_tokens(
        run(engine_for(model, **PAGES), prompts_of(5, 40, 3), GREEDY)
    )


def test_the_sizes_of_buckets() -> None:
    assert [buckets(most) for most in (1, 2, 3, 16, 20)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 20)
    ]  # fmt: skip
    assert buckets(256) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    for most in range(1, 600):
        found = buckets(most)
        assert list(found) == sorted(set(found))
        assert found[-1] == most
        assert all(b <= 2 * a for a, b in itertools.pairwise(found))


def test_passes_beyond_the_largest_bucket_run_as_they_are(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_ROWS == 512
    monkeypatch.setattr("vattention.engine.graphs.MOST_ROWS", 2)
    expected, tokens, engine = both(
        model,
        lambda engine: all_tokens(run(engine, prompts_of(5, 6, 7), [GREEDY, GREEDY, SamplingParams(max_tokens=4)])),
    )
    assert tokens == expected
    assert graphs_of(engine).captured == (2,)
    assert 0 < replays(engine) < decodes(engine)


def test_nobody_touches_the_pool_while_a_graph_is_captured(model: LoadedModel) -> None:
    capture = CaptureOnACPU()
    engine = graphed(model, capture)
    cache = engine._cache
    assert isinstance(cache, KVCache)
    waited = []

    def others() -> None:
        thread = threading.Thread(target=cache.pool.stats)
        thread.start()
        thread.join(0.05)
        waited.append(thread.is_alive())

    capture.watch = others
    run(engine, prompts_of(5), GREEDY)
    assert waited == [True]


def test_a_cache_of_blocks_is_not_captured(model: LoadedModel) -> None:
    engine = engine_for(model, cache="paged", memory="4MiB")
    assert isinstance(engine._cache, PagedKVCache)
    assert Runner(model.model, engine._cache, capture=CaptureOnACPU()).graphs is None


# -- when it cannot be


def test_a_model_that_asks_for_numbers_runs_as_it_is_after_one_warning() -> None:
    tiny = tiny_model()
    model = loaded(tiny)
    expected = all_tokens(run(engine_for(model, **PAGES), prompts_of(5, 40, 7), GREEDY))
    mlp = tiny.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) if float(x.sum()) < 1e30 else x
    engine = graphed(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert all_tokens(run(engine, prompts_of(5, 40, 7), GREEDY)) == expected
    assert ["cannot be captured (CannotBeCaptured" in str(w.message) for w in caught] == [True]
    assert graphs_of(engine).captured == ()


def test_attention_without_a_kernel_for_it_runs_as_it_is(model: LoadedModel) -> None:
    """float32 on this device: `choose.decode_plan` refuses."""
    engine = engine_for(model, **PAGES)
    runner: Any = engine._runner
    runner.runner = Runner(model.model, engine._cache, capture=CaptureOnACPU())
    with pytest.warns(RuntimeWarning, match="without a CUDA graph, slower: .*no kernel here computes decodes"):
        tokens = all_tokens(run(engine, prompts_of(5, 40), GREEDY))
    assert tokens == all_tokens(run(engine_for(model, **PAGES), prompts_of(5, 40), GREEDY))


def test_no_memory_for_one_more_graph_leaves_those_that_are(model: LoadedModel) -> None:
    class Full(CaptureOnACPU):
        def __call__(self, work: Any) -> Captured:
            if len(self.recordings) == 1:
                raise torch.OutOfMemoryError("no memory")
            return super().__call__(work)

    engine = graphed(model, Full())
    with pytest.warns(RuntimeWarning, match="decode passes of 2 rows .*OutOfMemoryError: no memory"):
        engine.warmup()
    assert graphs_of(engine).captured == (4,)
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (12, 20, 8)]
    tokens = all_tokens(run(engine, prompts_of(5, 40, 7), params))
    assert tokens == all_tokens(run(engine_for(model, **PAGES), prompts_of(5, 40, 7), params))
    assert 0 < replays(engine) < decodes(engine)


def test_a_pass_that_fails_is_computed_request_by_request(model: LoadedModel) -> None:
    """The engine's way out of a failing pass, with replays: nothing is lost."""
    engine = graphed(model)
    real, failures = graphs_of(engine).run, []

    def run_(chunks: Any) -> Any:
        if len(chunks) > 1 and len(failures) < 2:
            failures.append(len(chunks))
            raise RuntimeError("the device stumbles")
        return real(chunks)

    graphs_of(engine).run = run_  # type: ignore[method-assign]
    tokens = all_tokens(run(engine, prompts_of(5, 40, 7), GREEDY))
    assert len(failures) == 2
    assert tokens == all_tokens(run(engine_for(model, **PAGES), prompts_of(5, 40, 7), GREEDY))


def test_the_streams_of_passes_are_told_to_the_cache_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    current = iter([7, 7, 9, 7])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(current)))
    streams = _Streams(SimpleNamespace(watch=told.append), torch.device("cuda", 0))  # type: ignore[arg-type]
    for _ in range(4):
        streams.note()
    assert told == [7, 9]


def test_how_a_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream and one pool for all graphs; a run before each capture; nobody else's allocations end it."""
    events: list[Any] = []

    def fake(name: str, result: Any = None) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            events.append((name, *args, *more.items()))
            return contextlib.nullcontext() if result is None else result

        return call

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = str(name)

        def __repr__(self) -> str:
            return self.name

        def wait_stream(self, other: Any) -> None:
            events.append(f"{self} waits for {other}")

    graph = SimpleNamespace(replay=lambda: events.append("replay"))
    for name, result in (("device", None), ("stream", None), ("graph", None), ("graph_pool_handle", "pool")):
        monkeypatch.setattr(torch.cuda, name, fake(name, result))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    device = torch.device("cuda", 1)
    capture = CudaCapture(device)
    assert events == [("device", device), ("graph_pool_handle",)]
    for _ in range(2):
        events.clear()
        captured = capture(lambda: events.append("work") or torch.ones(1))  # type: ignore[func-returns-value]
        captured.replay()
        how = (("pool", "pool"), ("stream", capture._stream), ("capture_error_mode", "thread_local"))
        assert events == [
            ("device", device),
            "side waits for main",
            ("stream", capture._stream),
            "work",
            "main waits for side",
            ("graph", graph, *how),
            "work",
            "replay",
        ]


# -- padding


def test_padding_writes_what_the_first_row_writes_and_reads_what_is_mapped(model: LoadedModel) -> None:
    """Three requests in four rows. Not one byte differs of what a pass of exactly three rows leaves in the cache."""
    left = []
    for rows in (3, 4, 8):
        layers = [(torch.full((5, 32, 2, 8), torch.nan), torch.full((5, 32, 2, 8), torch.nan)) for _ in range(2)]
        for k, v in layers:
            for slot, length in ((4, 7), (0, 1), (2, 20)):
                k[slot, : length - 1] = v[slot, : length - 1] = 0.5
        batch = DecodeBatch(
            layers, rows, plan_on_a_cpu(rows, bound=32, dtype=torch.float32, device=torch.device("cpu"))
        )
        batch.update([9, 8, 7], [4, 0, 2], [7, 1, 20])
        assert batch.tokens.tolist() == [9, 8, 7, *[0] * (rows - 3)]
        assert batch.positions.tolist() == [6, 0, 19, *[0] * (rows - 3)]
        generator = torch.Generator().manual_seed(0)
        q, new_k, new_v = (torch.randn((1, heads, rows, 8), generator=generator) for heads in (4, 2, 2))
        q[..., :3, :], new_k[..., :3, :], new_v[..., :3, :] = 1.0, 2.0, 3.0
        outs = [batch.compute(layer, q, new_k, new_v, Features()) for layer in range(2)]
        assert all(bool(out.isfinite().all()) for out in outs)
        left.append([torch.nan_to_num(x, -7.0) for pair in layers for x in pair])
    for one, two, three in zip(*left, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    ("tokens", "slots", "lengths"),
    [([], [], []), ([1] * 5, [0, 1, 2, 3, 4], [1] * 5), ([1, 1], [3, 3], [5, 5]), ([1], [0], [0])],
    ids=["nobody", "too many", "a slot twice", "no token"],
)
def test_what_is_no_pass(tokens: Any, slots: Any, lengths: Any) -> None:
    layers = [(torch.zeros(5, 8, 1, 4), torch.zeros(5, 8, 1, 4))]
    batch = DecodeBatch(layers, 4, plan_on_a_cpu(4, bound=8, dtype=torch.float32, device=CPU))
    with pytest.raises(InvalidRequest, match="do not make a pass of 4 rows"):
        batch.update(tokens, slots, lengths)


# -- the operator of a device, and compiled layers


def test_the_plan_that_a_device_has_with_the_operators_stand_in(model: LoadedModel) -> None:
    """`varlen.decode`, whose numbers are in tensors: the call that is captured is the one that a device gets."""
    half = loaded(tiny_model().half())
    flash = FlashOnACPU()
    _register_flash(flash)

    def plan(rows: int, *, bound: int, dtype: torch.dtype, device: torch.device) -> DecodePlan:
        numbers = DecodeRows([0] * rows, [1] * rows, bound=bound, device=device)
        return DecodePlan(numbers, decode(numbers, operator=torch.ops.vattention_test.flash))

    engine = engine_for(half, **PAGES)
    runner: Any = engine._runner
    capture = CaptureOnACPU()
    runner.runner = Runner(half.model, engine._cache, capture=capture, plan=plan)
    requests = run(engine, prompts_of(20, 5, 33), GREEDY)
    assert sum(recording.replays for recording in capture.recordings) > 10
    plain = engine_for(half, **PAGES)
    others = run(plain, prompts_of(20, 5, 33), GREEDY)
    theirs: Any = plain._runner
    for one, other in zip(requests, others, strict=True):
        ours, reference = runner.of(one.request_id), theirs.of(other.request_id)
        assert torch.allclose(ours[0], reference[0], atol=0.05 * float(reference.std()))
    assert {call.max_k for call in flash.calls} == {256}, "the bound, and no length"
    assert {call.max_q for call in flash.calls} == {1}


_flash_library = torch.library.Library("vattention_test", "FRAGMENT")


def _register_flash(flash: FlashOnACPU) -> None:
    """The operator's stand-in as an operator, so that a capture sees it."""
    _flash_library.define(
        "flash(Tensor q, Tensor k, Tensor v, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float p,"
        " bool is_causal, bool debug, *, float? scale=None, int? window_size_left=None, int? window_size_right=None,"
        " Tensor? seqused_k=None) -> (Tensor, Tensor)"
    )

    def run_it(*args: Any, **kwargs: Any) -> Any:
        return flash(*args, **kwargs)[:2]

    _flash_library.impl("flash", run_it, "CPU")


def _again(work: Callable[[], torch.Tensor]) -> Captured:
    """A capture that runs the work again: compiled code is no sequence of operators to note."""
    output = work()

    def replay() -> None:
        output.copy_(work())

    return Captured(replay, output)


def test_compiled_layers_are_what_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before they are compiled; then attention gets the batch whose numbers stay, through the ticket."""
    go = threading.Event()
    prepare = compiled.CompiledModel._prepare
    monkeypatch.setattr(compiled.CompiledModel, "_prepare", lambda self, model: go.wait(60) and prepare(self, model))
    monkeypatch.setattr(
        compiled, "_compile", lambda **_: lambda layer, *args, **kwargs: layer._call_impl(*args, **kwargs)
    )
    model = loaded(tiny_model())
    expected = all_tokens(run(engine_for(model, **PAGES), prompts_of(5, 40, 7), GREEDY))
    engine = graphed(model, _again, compile=True)
    assert all_tokens(run(engine, prompts_of(5, 40, 7), GREEDY)) == expected
    assert graphs_of(engine).captured == ()
    passes: list[bool] = []
    real = compiled.CompiledModel.run

    def noting(self: Any, model: Any, batch: Any, **inputs: Any) -> Any:
        passes.append(isinstance(batch, DecodeBatch))
        return real(self, model, batch, **inputs)

    monkeypatch.setattr(compiled.CompiledModel, "run", noting)
    go.set()
    engine.warmup()
    assert graphs_of(engine).captured == (1, 2, 4)
    assert any(passes)
    assert all_tokens(run(engine, prompts_of(5, 40, 7), GREEDY)) == expected


# -- the controls: the stand-in sees what would be wrong


def _without(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """The numbers of one row of `DecodeBatch` stay what they were at the capture."""
    update = DecodeBatch.update

    def stale(self: DecodeBatch, *args: Any) -> None:
        before = self._numbers[row].clone()
        update(self, *args)
        if getattr(self, "seen", False):
            self._numbers[row] = before
        self.seen = True  # type: ignore[attr-defined]

    monkeypatch.setattr(DecodeBatch, "update", stale)


@pytest.mark.parametrize("row", [0, 1, 2, 3], ids=["tokens", "positions", "slots", "places"])
def test_numbers_that_do_not_change_give_other_tokens(
    model: LoadedModel, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(engine: Engine) -> Any:
        first = run(engine, prompts_of(30), SamplingParams(temperature=0, max_tokens=5))
        return all_tokens([*first, *run(engine, prompts_of(30, 40, seed=9), GREEDY)])

    # A page holds all tokens of a slot, and slots keep theirs: what is written to the wrong place is written to memory.
    options = {"poison": False, "guard": False, "max_num_seqs": 2, "page_size": "64KiB"}
    expected = act(engine_for(model, **{**PAGES, **options}))
    assert act(graphed(model, **options)) == expected
    _without(monkeypatch, row)
    engine = graphed(model, **options)
    try:
        assert act(engine) != expected
    except Exception as error:
        assert "not finite" in str(error)


def test_the_stand_in_replays_on_the_same_memory_and_sees_what_is_gone() -> None:
    static, out = torch.ones(3), torch.zeros(3)
    captured = CaptureOnACPU()(lambda: out.copy_(static * 2))
    static.fill_(5)
    captured.replay()
    assert out.tolist() == [10, 10, 10]
    with pytest.raises(AssertionError, match="given back"):
        CaptureOnACPU()(lambda: static + torch.tensor([1.0, 2.0, 3.0]))
    gone = [torch.ones(1000)]
    captured = CaptureOnACPU()(lambda: gone[0] + 1)
    captured.replay()
    assert captured.output.tolist() == [2] * 1000
    gone.clear()
    with pytest.raises(AssertionError, match="given back"):
        captured.replay()
    for inference in (True, False):
        with torch.inference_mode(inference):
            for asks in (
                lambda: static + float(static.sum()),
                lambda: static[static > 1],
                lambda: torch.where(static)[0],
            ):
                with pytest.raises(CannotBeCaptured):
                    CaptureOnACPU()(asks)

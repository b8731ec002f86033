"""What a GPU has left for K and V, and when graphs are captured, on a machine without: its numbers are made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.graphs import CaptureOnACPU, plan_on_a_cpu
from support.models import loaded, prompts_of, tiny_model
from vattention import LLM, ConfigError, KVCache, KVLayout, SamplingParams
from vattention.engine import budget, opening
from vattention.engine.budget import activation_bytes
from vattention.engine.runner import Runner

MIB = 1 << 20
FREE = 40 * MIB
"""What a device is said to have free, less what is to stay so."""

PEAK = 5 * MIB
"""What the largest pass is said to take."""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache and a model on the CPU that `open_engine` takes to be on a GPU; what is asked of it, in order."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("largest pass"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 100 * MIB + PEAK)

    class OnACPU(KVCache):
        def __init__(
            self, layout: KVLayout, *, device: Any, memory: Any, memory_utilization: Any, **options: Any
        ) -> None:
            assert device.type == "cuda"
            events.append("cache")
            super().__init__(layout, memory=memory or "64MiB", **options)

    def capture(device: torch.device) -> Any:
        assert device.type == "cuda"
        on_a_cpu = CaptureOnACPU()
        return lambda work: events.append("capture") or on_a_cpu(work)

    def left(driver: Any, share: float | None) -> int:
        events.append(f"left at {share}")
        return FREE

    monkeypatch.setattr(opening, "_place", lambda model, device: torch.device("cuda", 0))
    look = opening.look
    monkeypatch.setattr(opening, "look", lambda place, given, share: look(torch.device("cpu"), given or 64 * MIB))
    monkeypatch.setattr(opening, "KVCache", OnACPU)
    monkeypatch.setattr(opening, "CudaCapture", capture)
    monkeypatch.setattr(opening, "Runner", lambda *args, **more: Runner(*args, **{**more, "plan": plan_on_a_cpu}))
    monkeypatch.setattr(budget, "default_budget", left)
    return events


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    given: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts_of(5, 40, 7)]
    params = SamplingParams(temperature=0, max_tokens=8)
    return [tuple(output.outputs[0].token_ids) for output in llm.generate(given, params, use_tqdm=False)]


def test_the_budget_is_what_graphs_and_the_largest_pass_leave(events: list[str]) -> None:
    model = loaded(tiny_model())
    with LLM(model, max_num_seqs=4, compile=False) as llm:
        assert events == ["cache", *["capture"] * 3, "largest pass", "left at None"]
        stats = llm.stats()
        # Pages that the capture has left mapped are the cache's already.
        assert stats.created > 0
        assert stats.budget == FREE - PEAK + stats.created
        with_graphs = tokens(llm)
        assert events.count("capture") == 3
        llm.warmup()
        assert events.count("capture") == 3
    with LLM(model, max_num_seqs=4, cuda_graphs=False, memory_utilization=0.5, compile=False) as llm:
        assert events[6:] == ["cache", "largest pass", "left at 0.5"]
        assert tokens(llm) == with_graphs


def test_a_size_that_is_given_stays(events: list[str]) -> None:
    with LLM(loaded(tiny_model()), max_num_seqs=2, kv_cache_memory="8MiB", compile=False) as llm:
        assert events == ["cache", "capture", "capture"]
        assert llm.stats().budget == 8 * MIB


def test_nothing_left_is_said_and_nothing_stays_open(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "default_budget", lambda driver, share: PEAK // 2)
    with pytest.raises(ConfigError, match=r"5 MiB for the largest pass leave no memory .*cuda_graphs=False"):
        LLM(loaded(tiny_model()), max_num_seqs=2, compile=False)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cuda_graphs": True}, "cuda_graphs=True is for a GPU"),
        ({"memory_utilization": 0.5}, "memory_utilization is for a GPU: give kv_cache_memory"),
    ],
)
def test_what_means_nothing_on_a_cpu(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        LLM("never looked at", device="cpu", **options)
    with LLM(loaded(tiny_model()), device="cpu", kv_cache_memory="4MiB", cuda_graphs=False) as llm:
        runner: Any = llm.engine._runner
        assert runner.graphs is None


@pytest.mark.usefixtures("events")
def test_two_answers_to_how_much() -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory and memory_utilization both say how much"):
        LLM(loaded(tiny_model()), kv_cache_memory="8MiB", memory_utilization=0.5)


def test_the_largest_pass_is_run_and_sampled_without_a_cache(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tiny_model())
    seen: list[Any] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"].shape, kwargs["logits_to_keep"].shape)),
        with_kwargs=True,
    )
    real = budget.sampler.sample
    monkeypatch.setattr(budget.sampler, "sample", lambda logits, rows: seen.append(logits.shape) or real(logits, rows))
    assert activation_bytes(model.model, 33, 4) == PEAK
    assert seen == [((1, 33), (4,)), (4, 211)]

"""FlexAttention on slots: compiled for the CPU, and what only a GPU computes against its definition."""

import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from support.flex import flex_on_a_cpu
from support.segments import filled, segments_of
from vattention.attention import blocked, choose, flex, varlen
from vattention.attention.base import Attend, Features, Segment
from vattention.attention.decode_plan import DecodeRows
from vattention.cache import KVCache, KVLayout
from vattention.cache.layout import LayerShape
from vattention.errors import ConfigError

CPU = torch.device("cpu")
SINKS = torch.tensor([-1.0, 0, 1, 2, 3, 30])
MIXED = [(2, 17, 17), (0, 1, 400), (3, 130, 300), (1, 1, 1)]


def check(attend: Attend, segments: list[Segment], tensors: tuple[torch.Tensor, ...], asked: Features) -> None:
    query, keys, values = tensors
    exact = blocked.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, asked)
    out = attend(query, keys, values, asked)
    assert (out.shape, out.dtype) == (exact.shape, exact.dtype)
    torch.testing.assert_close(out, exact, atol=1e-5 if keys.dtype == torch.float32 else 2e-2, rtol=0)


def compiled(dtype: torch.dtype, width: int, value_dim: int, batch: Any, asked: list[Features]) -> None:
    """For real, in a cache where reading behind a length crashes, or meets NaN."""
    segments = segments_of(batch)
    layout = KVLayout(1, 2, max(width, value_dim), dtype, 4, 600, shapes=(LayerShape(2, width, value_dim),))
    with KVCache(layout, memory="64MiB", guard=True, poison=True) as cache, torch.inference_mode():
        tensors = filled(cache, segments, 6)
        assert flex.missing(CPU) is None
        for features in asked:
            assert flex.can(*tensors, features)
            check(flex.prepare(segments, dtype=dtype, device=CPU), segments, tensors, features)
        del tensors


def test_compiled_for_the_cpu() -> None:
    """One piece of code for every length, window, scale and cap; two, as there are as many blocks of rows as heads."""
    asked = [Features(0.3, window, softcap) for window in (None, 1, 5, 200) for softcap in (1.5, 50.0)]
    graphs = counters["stats"]["unique_graphs"]
    compiled(torch.float32, 16, 16, [(2, 17, 18), (3, 300, 300), (1, 2, 400)], asked)
    assert counters["stats"]["unique_graphs"] <= graphs + 2


@pytest.mark.slow
@pytest.mark.parametrize("value_dim", [16, 24])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_the_cpu_in_every_way(dtype: torch.dtype, softcap: float | None, value_dim: int) -> None:
    compiled(dtype, 24, value_dim, MIXED, [Features(None, window, softcap) for window in (None, 1, 5, 200)])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for a GPU, run as it is written, over what stands in for its kernel."""
    monkeypatch.setattr(flex, "_compiled", lambda make, capped, kind: make(capped, kind))
    monkeypatch.setattr(flex, "flex_attention", flex_on_a_cpu)


ASKED = [
    Features(0.1),
    Features(None, 5),
    Features(0.1, 130, softcap=1.5),
    Features(0.1, softcap=1.5, sinks=SINKS),
    Features(0.1, 200, sinks=SINKS),
    Features(0.1, 1),
]
LENGTHS = [1, 2, 127, 128, 129, 255, 256, 257, 400, 600]


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decodes_and_prompts_of_a_gpu(uncompiled: None, dtype: torch.dtype, asked: Features) -> None:
    """NaN, and nothing, behind every length: whole blocks are read, and only full ones."""
    for first in (0, 3, 6):
        batch = [(slot, 1, LENGTHS[first + n]) for n, slot in enumerate((2, 0, 3, 1))]
        segments = segments_of(batch)
        with KVCache(KVLayout(1, 2, 16, dtype, 4, 600), memory="64MiB", guard=True, poison=True) as cache:
            tensors = filled(cache, segments, 6)
            rows = DecodeRows([s.slot for s in segments], [s.length for s in segments], device=CPU)
            check(flex.decode(rows), segments, tensors, asked)
            del tensors
    segments = segments_of(MIXED)
    with KVCache(KVLayout(1, 2, 16, dtype, 4, 600), memory="64MiB", guard=True, poison=True) as cache:
        tensors = filled(cache, segments, 6)
        check(flex._prompts(segments, CPU), segments, tensors, asked)
        del tensors


def test_the_control_of_the_one_above(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a block too many, what stands in for the kernel meets what is not there."""
    real = flex._blocks_of_slots

    def one_more(*args: Any) -> Any:
        first, count, *rest = real(*args)
        return first, [number + 1 for number in count], *rest

    monkeypatch.setattr(flex, "_blocks_of_slots", one_more)
    segments = segments_of([(2, 1, 400), (1, 1, 300)])
    with KVCache(KVLayout(1, 2, 16, torch.float32, 4, 600), memory="64MiB", poison=True) as cache:
        query, keys, values = filled(cache, segments, 6)
        rows = DecodeRows([2, 1], [400, 300], device=CPU, bound=600)
        assert flex.decode(rows)(query, keys, values, Features()).isnan().any()
        del keys, values


def test_one_plan_for_many_passes(uncompiled: None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = DecodeRows([0] * 3, [1] * 3, bound=600, device=CPU)
    attend = flex.decode(rows)
    with KVCache(KVLayout(1, 2, 16, torch.float32, 4, 600), memory="64MiB", guard=True, poison=True) as cache:
        for _ in range(4):
            cache.alloc()
        keys, values = cache.layer(0)
        addresses = None
        for slots, lengths in (([2, 0, 3], [127, 400, 1]), ([2, 0, 3], [129, 401, 2]), ([1], [300])):
            cache.step(dict(zip(slots, lengths, strict=True)))
            for slot, length in zip(slots, lengths, strict=True):
                for view in (keys, values):
                    view[slot, :length] = torch.randn((length, 2, 16), generator=generator)
            query = torch.randn(6, 3, 16, generator=generator)
            more = 3 - len(slots)
            rows.update([*slots, *slots[:1] * more], [*lengths, *[1] * more])
            segments = segments_of([(slot, 1, length) for slot, length in zip(slots, lengths, strict=True)])
            asked = Features(0.2, 150, 3.0, SINKS)
            exact = blocked.prepare(segments, dtype=keys.dtype, device=CPU)(query[:, : len(slots)], keys, values, asked)
            out = attend(query, keys, values, asked)
            torch.testing.assert_close(out[: len(slots)], exact, atol=1e-5, rtol=0)
            assert out.isfinite().all(), "of padding too"
            now = [tensor.data_ptr() for _, _, kept in rows._kept.values() for tensor in kept]
            addresses = addresses or now
            assert addresses == now
        del keys, values


def test_what_it_cannot_do() -> None:
    query, keys = torch.zeros(4, 3, 64), torch.zeros(4, 32, 2, 64)
    assert flex.can(query, keys, keys, Features(0.1, 5, 2.0))
    assert flex.can(query, keys, keys[..., :32], Features())
    assert not flex.can(query, keys, keys, Features(sinks=torch.zeros(4))), "no logsumexp on a CPU"
    assert not flex.can(query.half(), keys, keys, Features())
    assert not flex.can(query.double(), keys.double(), keys.double(), Features())
    meta = keys.to("meta")
    assert flex.can(query, meta, meta, Features(sinks=torch.zeros(4)))
    assert flex.missing(meta.device) == "it is for GPUs and CPUs"


def test_where_it_cannot_be_compiled_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise TorchDynamoException("no compiler\nand more")

    monkeypatch.setattr(flex, "_failure", None)
    monkeypatch.setattr(flex, "_compiled", lambda *kind: fails)
    monkeypatch.setattr(varlen, "available", lambda device: False)
    segments = segments_of(MIXED)
    with KVCache(KVLayout(1, 2, 16, torch.float32, 4, 600), memory="64MiB") as cache:
        tensors = filled(cache, segments, 6)
        attend = choose._elsewhere(tuple(segments), torch.float32, CPU)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                check(attend, segments, tensors, Features(softcap=2.0))
        (warning,) = caught
        assert "FlexAttention cannot be compiled here (TorchDynamoException: no compiler): layers" in str(
            warning.message
        )
        assert flex.missing(CPU) == "it could not be compiled here (TorchDynamoException)"
        monkeypatch.setattr(flex, "missing", lambda device: None)
        named = choose.only("flex", choose.named("flex", CPU))(segments, dtype=torch.float32, device=CPU)
        with pytest.raises(ConfigError, match="'flex' cannot be compiled here"):
            named(*tensors, Features())
        del tensors


@pytest.mark.slow
def test_without_a_compiler() -> None:
    """In a process of its own, for real."""
    script = """
        import warnings, torch
        from vattention.attention import choose, flex, varlen
        from vattention.attention.base import Features, Segment
        flex.missing = lambda device: None if flex._failure is None else "failed"
        keys, query = torch.randn(2, 40, 2, 16), torch.randn(4, 40, 16)
        attend = choose._elsewhere((Segment(1, 0, 40, 40),), torch.float32, torch.device("cpu"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                out = attend(query, keys, keys, Features())
        print([str(w.message)[:39] for w in caught if w.category is RuntimeWarning])
        print(bool(out.isfinite().all()), flex._failure is not None)
    """
    none = "/nonexistent"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={
            "CXX": f"{none}/c++",
            "PATH": none,
            "HOME": none,
            "PYTHONPATH": ":".join(sys.path),
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        },
    )
    lines = done.stdout.splitlines()[-2:]
    assert lines == ["['FlexAttention cannot be compiled here (']", "True True"], done.stderr


def test_a_gpu_gets_it_where_flash_attention_does_not_do(monkeypatch: pytest.MonkeyPatch, uncompiled: None) -> None:
    used: list[str] = []
    for name in ("flex", "blocked"):
        kernel = getattr(choose, name)
        real = kernel.prepare
        monkeypatch.setattr(
            kernel, "prepare", lambda *args, name=name, real=real, **rest: used.append(name) or real(*args, **rest)
        )
    monkeypatch.setattr(flex, "missing", lambda device: None)
    segments = tuple(segments_of(MIXED))
    with KVCache(KVLayout(1, 2, 16, torch.float32, 4, 600), memory="64MiB") as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        query, keys, values = filled(cache, list(segments), 6)
        attend = choose._elsewhere(segments, torch.float32, CPU)
        check(attend, list(segments), (query, keys, values), Features(softcap=2.0))
        assert used == ["blocked", "flex"]  # the first is what it is compared with
        attend(query, keys, values, Features(sinks=SINKS))  # which flex has on GPUs alone
        assert used == ["blocked", "flex", "blocked"]
        del keys, values

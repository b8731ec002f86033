"""Kernels on a GPU, each against plain operations in float32, over a real cache with NaN behind every length.

Kernels from other packages are skipped where these are not installed. FlashAttention and FlexAttention come with torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import emulated_cuda
from support.models import loaded, prompts_of, tiny_model
from support.segments import filled, segments_of
from vattention import LLM, SamplingParams
from vattention.attention import blocked, choose
from vattention.attention.base import Features
from vattention.cache import KVCache, KVLayout
from vattention.cache.layout import LayerShape
from vattention.errors import ConfigError

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(emulated_cuda.ACTIVE, reason="needs kernels, which the emulation does not have"),
]

OTHERS = ("flashinfer", "flash-attn-2", "flash-attn-3")
BATCHES = {
    "decodes": [(2, 1, 1700), (0, 1, 3), (3, 1, 128), (1, 1, 129)],
    "mixed": [(3, 1, 700), (0, 1, 1), (2, 130, 900), (1, 40, 40)],
}
ASKED = {
    "plain": Features(),
    "window": Features(0.1, 100),
    "soft cap": Features(0.1, None, 1.5),
    "soft cap and window": Features(0.1, 300, 1.5),
    "sinks": Features(0.1, 200, sinks=torch.linspace(-2, 4, 8)),
}
PASSES = [([2, 0, 3], [700, 40, 1]), ([2, 0, 3], [701, 41, 2]), ([1, 2, 2], [1800, 128, 1]), ([3, 0, 1], [1, 1, 129])]
"""Of a slot that is named twice, the first row is meant."""


def on_device(asked: Features) -> Features:
    return Features(asked.scaling, asked.window, asked.softcap, None if asked.sinks is None else asked.sinks.to(DEVICE))


def family_or_skip(name: str) -> None:
    reason = choose._FAMILIES[name]().missing(DEVICE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def exact(segments: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, asked: Features) -> Any:
    prepared = blocked.prepare(segments, dtype=torch.float32, device=DEVICE)
    return prepared(query.float(), keys.float(), values.float(), asked)


def close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


KERNELS = [
    *(("flash", dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(("flex", dtype) for dtype in (torch.float32, torch.bfloat16)),
    *((name, torch.bfloat16) for name in OTHERS),
]
LAYOUTS: list[dict[str, Any]] = [{}, {"head_major": True}, {"kv_together": True, "layers_per_stream": None}]
# Each layout is compiled for anew, which takes seconds: not for every feature.
CASES = [
    (*kernel, asked, layout)
    for kernel in KERNELS
    for asked in ASKED
    for layout in (LAYOUTS if kernel[0] != "flex" or asked == "soft cap" else LAYOUTS[:1])
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "dtype", "asked", "layout"), CASES, ids=str)
def test_a_kernel_over_slots(name: str, dtype: torch.dtype, asked: str, layout: dict[str, Any], batch: str) -> None:
    family_or_skip(name)
    features, segments = on_device(ASKED[asked]), segments_of(BATCHES[batch])
    with KVCache(KVLayout(2, 2, 64, dtype, 4, 2000, **layout), device="cuda", memory="256MiB", poison=True) as cache:
        query, keys, values = filled(cache, segments, 8)
        kernel = choose.only(name, choose.named(name, DEVICE))
        try:
            out = kernel(segments, dtype=dtype, device=DEVICE)(query, keys, values, features)
        except ConfigError as error:
            assert (name, asked) in {("flash", "soft cap"), ("flash", "soft cap and window"), ("flashinfer", "sinks")}
            pytest.skip(str(error))
        close(out, exact(segments, query, keys, values, features), dtype)
        del keys, values


def test_flex_with_v_of_another_width() -> None:
    segments = segments_of(BATCHES["mixed"])
    layout = KVLayout(1, 2, 96, torch.bfloat16, 4, 2000, shapes=(LayerShape(2, 96, 64),))
    with KVCache(layout, device="cuda", memory="256MiB", poison=True) as cache:
        query, keys, values = filled(cache, segments, 8)
        out = choose.prepare(segments, dtype=keys.dtype, device=DEVICE)(query, keys, values, Features())
        close(out, exact(segments, query, keys, values, Features()), keys.dtype)
        del keys, values


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("auto", torch.float32),
        ("flex", torch.bfloat16),
        ("flashinfer", torch.bfloat16),
        ("flash-attn-2", torch.bfloat16),
    ],
)
def test_a_captured_plan_replayed_over_other_slots(name: str, dtype: torch.dtype, asked: str) -> None:
    """One graph: slots and lengths change in place, pages come behind the same addresses."""
    if name != choose.AUTO:
        family_or_skip(name)
    if (name, asked) == ("flashinfer", "sinks"):
        pytest.skip("flashinfer is not used for sinks")
    features = on_device(ASKED[asked])
    with KVCache(KVLayout(2, 2, 64, dtype, 4, 2000), device="cuda", memory="256MiB", poison=True) as cache:
        while cache.alloc() is not None:
            pass
        cache.step(dict.fromkeys(range(4), 1))
        keys, values = cache.layer(1)
        for view in (keys, values):
            view[:, 0] = 0
        plan = choose.decode_plan(3, bound=2000, dtype=dtype, device=DEVICE, kernel=name)
        query = torch.zeros(3, 8, 64, dtype=dtype, device=DEVICE).transpose(0, 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                plan.attend(query, keys, values, features)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = plan.attend(query, keys, values, features)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for slots, lengths in PASSES:
            meant = len(set(slots))
            cache.step(dict(zip(slots[:meant], lengths[:meant], strict=True)))
            for slot, length in zip(slots[:meant], lengths, strict=False):
                for view in (keys, values):
                    view[slot, :length].normal_(generator=generator)
            query.normal_(generator=generator)
            plan.update(slots, lengths)
            graph.replay()
            for row, (slot, length) in enumerate(zip(slots[:meant], lengths, strict=False)):
                alone = segments_of([(slot, 1, length)])
                close(out[row : row + 1], exact(alone, query[:, row : row + 1], keys, values, features), dtype)
        del keys, values, graph


@pytest.mark.parametrize("name", ["flash", "flex", *OTHERS])
def test_an_engine_with_a_named_kernel(name: str) -> None:
    """Against "blocked", in the same engine: what is likely is likely for both."""
    family_or_skip(name)
    said = []
    for kernel in (name, "blocked"):
        model = tiny_model("mistral", head_dim=64, max_position_embeddings=2048)
        for weight in model.parameters():
            weight.data = weight.data.to(torch.float16)
        with LLM(loaded(model.to(DEVICE)), attention_kernel=kernel, poison=True, kv_cache_memory="256MiB") as llm:
            outputs = llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts_of(1, 17, 64, 100)],
                SamplingParams(temperature=0, max_tokens=1, logprobs=1),
                use_tqdm=False,
            )
        said.append([next(iter(output.outputs[0].logprobs[0].values())).logprob for output in outputs])
    torch.testing.assert_close(torch.tensor(said[0]), torch.tensor(said[1]), atol=0.1, rtol=0)

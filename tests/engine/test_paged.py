"""The paged cache under the same engine: what layout cannot change, which is everything that is said."""

from typing import Any

import pytest
import torch

from support.models import Recorder, engine_for, loaded, prompts_of, run, tiny_model
from vattention import LLM
from vattention.attention import choose, cpu_decode
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.sampling_params import SamplingParams

PROMPTS = prompts_of(1, 2, 17, 64, 65, 100, 5, 33)
PARAMS = [
    SamplingParams(temperature=(i % 3) / 2, max_tokens=12 + i, seed=i, n=3 if i % 3 == 2 else 1)
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


def said(engine: Engine) -> list[Any]:
    requests = run(engine, PROMPTS, PARAMS)
    stats = engine._cache.stats()
    assert (stats.live_slots, stats.mapped) == (0, 0)
    return [[tuple(sample.output_token_ids) for sample in request.family] for request in requests]


def logits(engine: Engine) -> dict[str, dict[int, torch.Tensor]]:
    recorder = engine._runner
    assert isinstance(recorder, Recorder)
    return recorder.logits


def both(model: LoadedModel, block_size: int, **options: Any) -> tuple[Engine, Engine]:
    return engine_for(model, **options), engine_for(model, cache="paged", block_size=block_size, poison=True, **options)


# Windows, soft caps, sinks, widths of K and V that differ, and layers of several shapes, all with grouped heads.
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_oss", "deepseek_v3", "mimo_v2_flash", "gemma4_text"])
@pytest.mark.parametrize("block_size", [16, 256])
def test_logits_are_those_of_the_virtual_cache_to_the_last_bit(kind: str, block_size: int) -> None:
    for changes in (
        {"max_num_seqs": 4, "max_num_batched_tokens": 24},
        {"max_num_seqs": 9, "max_num_batched_tokens": 512},
    ):
        virtual, blocks = both(loaded(tiny_model(kind)), block_size, **changes)
        for engine in (virtual, blocks):
            run(engine, PROMPTS, SamplingParams(temperature=0, max_tokens=12))
        ours, theirs = logits(blocks), logits(virtual)
        assert ours.keys() == theirs.keys()
        for name, rows in theirs.items():
            assert ours[name].keys() == rows.keys()
            for position, row in rows.items():
                assert torch.equal(ours[name][position], row)


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("block_size", [1, 16, 24, 256])
def test_samples_in_batches_and_chunks(
    model: LoadedModel, block_size: int, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = said(engine_for(model))
    if not compiler:
        monkeypatch.setattr(cpu_decode, "can", lambda *_, **__: False)
    for slots, rows in ((1, 5), (4, 512), (16, 33)):
        options = {"max_num_seqs": slots, "max_num_batched_tokens": rows}
        assert said(engine_for(model, cache="paged", block_size=block_size, poison=True, **options)) == expected


@pytest.mark.parametrize("block_size", [16, 256])
def test_preemption(model: LoadedModel, block_size: int) -> None:
    expected = said(engine_for(model, max_num_seqs=12))
    layout = engine_for(model)._cache.layout
    memory = (8 if block_size == 16 else 2) * block_size * layout.bytes_per_token
    tight = engine_for(
        model, cache="paged", block_size=block_size, memory=memory, max_num_seqs=12, max_num_batched_tokens=40
    )
    assert said(tight) == expected
    if block_size == 16:  # of 256, a block holds a whole request: those that run never need another
        assert tight.scheduler.preemptions > 0, "no pressure, no test"


def test_forks_share_blocks(model: LoadedModel) -> None:
    engine = engine_for(model, cache="paged", block_size=16)
    engine.add_request(PROMPTS[5], SamplingParams(max_tokens=4, n=3, temperature=1.0, seed=1))
    while engine._cache.stats().live_slots < 3:
        engine.step()
    engine.step()
    stats = engine._cache.stats()  # 101 tokens each: 6 full blocks together, and one each
    assert (stats.pages_in_use, stats.mapped // stats.pages_in_use) == (9, 21 * (stats.budget // 64) // 9)


def test_a_table_that_is_wrong_would_be_seen(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: tokens depend on the table, in decodes and in chunks."""
    expected = said(engine_for(model))
    decode, select = cpu_decode.prepare, torch.index_select
    blocks: dict[str, Any] = {"cache": "paged", "block_size": 16, "max_num_batched_tokens": 32}

    def twice_the_first(table: torch.Tensor) -> torch.Tensor:
        other = table.clone()
        other[:, 1] = torch.where(table[:, 1] < 0, table[:, 1], table[:, 0])
        return other

    with monkeypatch.context() as patched:
        patched.setattr(cpu_decode, "prepare", lambda segments, table: decode(segments, twice_the_first(table)))
        if cpu_decode._library(torch.float32, 0, 0) is not None:
            assert said(engine_for(model, **blocks)) != expected
    with monkeypatch.context() as patched:
        patched.setattr(
            torch, "index_select", lambda x, dim, at, **more: select(x, dim, at[:1].expand(len(at)), **more)
        )
        assert said(engine_for(model, **blocks)) != expected


def test_it_is_an_option(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"kv_cache_memory": "1MiB", "max_model_len": 128, "max_num_seqs": 2, "compile": False}
    with LLM(model, cache="paged", block_size=24, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": list(PROMPTS[2])}], SamplingParams(max_tokens=5), use_tqdm=False)
        llm.warmup()
        assert llm.stats().pages_in_use == 0
    assert "tokens fit" in capsys.readouterr().err
    with LLM(model, max_model_len=128, kv_cache_memory="1MiB") as llm:
        same = llm.generate([{"prompt_token_ids": list(PROMPTS[2])}], SamplingParams(max_tokens=5), use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == same[0].outputs[0].token_ids


def test_only_what_a_window_shows_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    select = torch.index_select

    def counting(cache: torch.Tensor, dim: int, blocks: torch.Tensor, **more: Any) -> torch.Tensor:
        copied.append(len(blocks))
        return select(cache, dim, blocks, **more)

    monkeypatch.setattr(torch, "index_select", counting)
    model = loaded(tiny_model("mistral", sliding_window=8))
    engine = engine_for(model, cache="paged", block_size=4, max_num_batched_tokens=16)
    assert engine._runner.runner._kernel.keywords["inner"] is choose.prepare  # type: ignore[attr-defined]
    run(engine, [PROMPTS[5]], SamplingParams(max_tokens=1))
    assert max(copied) == 4 + 2

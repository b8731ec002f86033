"""The parts of `make gpu-check` that need an engine or a layout, tiny and on the CPU."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from vattention.bench.gpu import clock, layouts, overlap, serving, work
from vattention.bench.gpu.model import SHAPES, random_model
from vattention.bench.gpu.parts import PARTS
from vattention.bench.gpu.report import Setting, plot
from vattention.bench.trace import Lengths
from vattention.errors import ConfigError

CPU = torch.device("cpu")
SETTING = Setting(CPU, seconds=60, tiny=True)


@pytest.fixture(scope="module")
def model():
    return random_model("tiny", CPU, torch.bfloat16)


def test_layouts_hold_waste_and_take_what_they_should(tmp_path):
    report = layouts.layouts(SETTING)
    found = {each["layout"]: each for each in report.samples["layouts"]}
    lengths = report.samples["lengths"]
    plain = found["token-major"]
    assert plain["streams"] == 6
    assert plain["tokens_per_page"] == [16, 32, 64, 128]  # a token is 256 bytes
    pages = sum(6 * -(-length * 256 // 4096) for length in lengths)
    assert plain["waste"][0] == pytest.approx(pages * 4096 / (sum(lengths) * 6 * 256) - 1)
    together = found["token-major, 2 layers a stream, K and V together"]
    assert together["waste"][0] < plain["waste"][0] < found["head-major"]["waste"][0]
    for each in found.values():
        assert len(each["decode"]) >= 3 <= len(each["prompt"])
    assert "chosen for requests of" in report.text
    plot(tmp_path / "x.png", report.panels, title="tiny")
    json.dumps(report.samples)
    assert layouts.layouts(Setting(CPU, seconds=0, tiny=True)).samples["left_out"] == list(found)


def test_a_trace_takes_the_place_of_drawn_lengths(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n100,1\n30,11\n")
    report = layouts.layouts(Setting(CPU, seconds=0, tiny=True, trace=str(trace)))
    assert report.samples["lengths"] == [100, 40]


def test_pages_come_in_the_background_between_steps_or_before(model, tmp_path):
    report = overlap.overlap(SETTING, model=model)
    here, elsewhere = report.samples["calls_by_the_engine"], report.samples["calls_by_others"]
    background, between, before = overlap.SIDES
    assert here[background] == 0 < elsewhere[background]
    assert elsewhere[between] == 0 < here[between]
    assert here[before] == elsewhere[before] == 0
    rounds = report.samples["rounds"]
    assert len({len(each) for each in rounds.values()}) == 1
    counts = {len(seconds) for each in rounds.values() for seconds in each}
    assert len(counts) == 1  # steps can be compared one by one
    assert counts.pop() >= 6  # of 12 tokens
    assert "worst/median" in report.text
    plot(tmp_path / "x.png", report.panels, title="tiny")
    json.dumps(report.samples)


@pytest.mark.parametrize(("tokens_per_page", "batch"), [(64, 3), (2048, 32), (512, 1), (16, 8)])
def test_prompts_end_shortly_before_a_page_does(tokens_per_page, batch):
    wanted = work.Sizes("", (batch,), 4096, 256, 65536, 0, 0, (1, 1), 0)
    lengths = overlap.crossing(tokens_per_page, batch, wanted)
    assert len(lengths) == batch
    for length in lengths:
        pages = [-(-(length + step) // tokens_per_page) for step in range(2, wanted.output - 1)]
        assert pages[-1] > pages[0]


def test_the_engine_over_slots_and_over_blocks(model, tmp_path):
    report = serving.serving(SETTING, model=model)
    samples = report.samples
    assert set(samples["served"]) == set(samples["decode_seconds"]) == {"slots", "slots, no graphs", "blocks of 256"}
    for name, served in samples["served"].items():
        assert served["done"] == served["requests"] == 4 == len(served["latencies"])
        assert served["per_minute"] > 0
        assert set(samples["decode_seconds"][name]) == {1, 3}
    slots, alike, blocks = (served["per_minute"] for served in samples["served"].values())
    expected = {"slots": slots / blocks, "slots, no graphs": alike / blocks}
    assert samples["over_blocks"] == pytest.approx(expected)
    assert "slots, no graphs over blocks of 256, requests a minute" in report.text
    assert "CPU kernel through a block table" in report.text
    plot(tmp_path / "x.png", report.panels, title="tiny")
    json.dumps(samples)


def test_a_workload_that_is_not_through_counts_what_is(model):
    wanted = work.sizes(SETTING, 0)
    with work.engine(model, wanted) as llm:
        served = work.serve(llm, [[1, 2, 3]] * 4, [60] * 4, seconds=0.0)
        assert (served.done, served.requests, served.latencies) == (0, 4, [])
        assert llm.engine.unfinished == 0
        assert llm.stats().live_slots == 0


def test_an_engine_that_cannot_be_is_named_and_the_other_measured(model, monkeypatch):
    monkeypatch.setitem(serving._ENGINES, "blocks of 256", {"cache": "paged", "block_size": 1 << 30})
    report = serving.serving(SETTING, model=model)
    assert set(report.samples["served"]) == {"slots", "slots, no graphs"}
    assert report.samples["over_blocks"] == {}
    assert "blocks of 256: not measured: ConfigError" in report.text


def test_the_limit_counts_weights_but_not_the_embedding(model):
    wanted = work.sizes(SETTING, 0)
    numbers = SHAPES["tiny"]
    embedding = numbers["vocab_size"] * numbers["hidden_size"] * 2
    kv = 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, width, bytes
    expected = model.weight_bytes - embedding + 3 * (24 + 6) * kv
    assert serving.limit(model, wanted, 3, 1.0) == expected


def test_the_size_of_weights_is_about_right(model):
    assert serving._bytes_of("tiny", SETTING) == pytest.approx(model.weight_bytes, rel=0.02)
    assert serving._bytes_of("Llama-3-8B", SETTING) == pytest.approx(16.06e9, rel=0.01)


def test_long_workloads_are_scaled_to_fit():
    wanted = work.sizes(SETTING, 0)
    scaled = work.workload(SETTING, wanted, trace=[Lengths(1000, 100), Lengths(10, 10)])
    assert max(request.stored for request in scaled) <= wanted.longest - 1
    assert work.workload(SETTING, wanted, trace=[Lengths(3, 4)]) == [Lengths(3, 4)]


# -- vLLM, by a worker that answers as its does

WORKER = """
import sys
sys.path.insert(0, {peers!r})
import json, os, wire

class Engine:
    def __init__(self, options):
        config = json.load(open(os.path.join(options["model"], "config.json")))
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert options["more"] == {{"load_format": "dummy"}}
        assert options["max_num_seqs"] == 3
    def conditions(self):
        return {{"version": "0.0"}}
    def generate(self, prompts, outputs):
        return [output {less} for output in outputs]
wire.serve(Engine)
"""


def worker(folder: Path, less: str = "") -> Path:
    peers = str(Path(serving.__file__).parents[1] / "peers")
    path = folder / "worker.py"
    path.write_text(textwrap.dedent(WORKER.format(peers=peers, less=less)))
    return path


def test_vllm_gets_the_same_work(tmp_path):
    setting = Setting(CPU, seconds=60, tiny=True, vllm_python=sys.executable)
    report = serving.vllm(setting, worker=worker(tmp_path))
    assert report.skipped is None
    assert report.samples["requests"] == 4
    assert report.samples["per_minute"] > 0
    assert report.text.startswith("vLLM 0.0: 4 requests")


def test_vllm_that_is_not_there_or_fails_is_left_out(tmp_path):
    assert "--vllm-python" in serving.vllm(SETTING).skipped
    there = Setting(CPU, seconds=60, tiny=True, vllm_python=sys.executable)
    assert "other numbers of tokens" in serving.vllm(there, worker=worker(tmp_path, "- 1")).skipped
    assert "vLLM: " in serving.vllm(there, worker=tmp_path / "none.py").skipped
    nowhere = Setting(CPU, seconds=60, tiny=True, vllm_python=os.path.join(tmp_path, "python"))
    assert "cannot run" in serving.vllm(nowhere).skipped


# -- the rest


def test_samples_are_taken_of_other_data_each_time_and_the_first_two_not_counted():
    seen = []
    samples = clock.Clock(CPU).samples(seen.append, seconds=0)
    assert seen == [0, 1, 2, 3, 4]
    assert len(samples) == 3
    assert len(clock.Clock(CPU).samples(seen.append, seconds=9, most=7)) == 7


def test_a_picture_that_cannot_be_written(tmp_path):
    report = layouts.layouts(Setting(CPU, seconds=0, tiny=True))
    with pytest.raises(ConfigError, match="cannot write the plot"):
        plot(tmp_path / "none" / "x.png", report.panels, title="")


def test_every_part_has_its_seconds():
    script = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
    assert all(f'"{part}"' in script.read_text() for part in PARTS)

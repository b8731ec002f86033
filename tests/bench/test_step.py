import json
from pathlib import Path

import pytest
import torch

from vattention.bench import step
from vattention.cli import main

SHORT = ["--requests", "3", "--prompt-tokens", "40", "--passes", "12"]


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_read_rate", lambda: 1e9)
    monkeypatch.setattr(step, "_matrix_rate", lambda dtype: 1e12)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_parts_make_the_pass(
    compiled: bool, tiny_directory: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    as_json, picture = tmp_path / "s.json", tmp_path / "s.png"
    command = ["bench", "step", tiny_directory, *SHORT, "--compile" if compiled else "--no-compile"]
    assert main([*command, "--dtype", "float32", "--json", str(as_json), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert picture.stat().st_size > 1000
    prefill, decode = json.loads(as_json.read_text())["results"]
    assert (prefill["kind"], decode["kind"]) == ("prefill", "decode")
    assert (decode["passes"], decode["tokens"]) == (12, 3)
    assert f"decode: 12 passes of 3 tokens, {3e3 / decode['milliseconds']['pass']:.0f} tokens/s" in printed
    for result in (prefill, decode):
        parts = dict(result["milliseconds"])
        whole = parts.pop("pass")
        assert sum(parts.values()) == pytest.approx(whole, rel=0.2)
        assert parts["attention"] > 0
        # float32 is left to torch, inside the layers: only a recorded pass tells its products from the rest.
        assert (parts["linear layers"] > 0) == (compiled and result is decode)
        assert parts["rest of the layers"] > 0
        assert parts["output layer"] > 0


def test_the_limit_of_decoding_is_its_bytes(tiny_directory: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    as_json = tmp_path / "s.json"
    command = ["bench", "step", tiny_directory, *SHORT, "--no-compile", "--dtype", "float32", "--json", str(as_json)]
    assert main([*command, "--expected-tokens", "45"]) == 0
    found = json.loads(as_json.read_text())
    assert found["layout"] == {"expected_tokens": 45}
    limits = found["results"][1]["limits"]
    model = AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    config = model.config
    heads = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    token = 2 * 4 * heads * config.num_hidden_layers
    assert limits["linear layers"] == pytest.approx(4 * matrices / 1e9 * 1e3)
    assert limits["output layer"] == pytest.approx(4 * config.vocab_size * config.hidden_size / 1e9 * 1e3)
    assert limits["attention"] == pytest.approx(3 * 46 * token / 1e9 * 1e3)


@pytest.mark.parametrize("options", [["--requests", "0"], ["--passes", "0"], ["--plot", "no/such/folder/x.png"]])
def test_bad_options_are_one_line_and_exit_code_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "./never-looked-at", *options]) == 2
    assert capsys.readouterr().err.startswith("vattention: ")

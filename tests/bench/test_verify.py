import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vattention.attention import sdpa
from vattention.attention.base import NAME
from vattention.bench.prompts import make_prompts, spread
from vattention.bench.reference import Answer, Reference
from vattention.bench.verify import judge
from vattention.cli import main
from vattention.engine.loading import load_model
from vattention.engine.runner import Runner
from vattention.errors import ConfigError

FEW = ["--prompts", "5", "--longest", "150", "--max-tokens", "8", "--kv-cache-memory", "64MiB"]


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_engine_passes(tiny_directory: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    assert main(["verify", tiny_directory, *FEW, "--chunk", "16", "--guard", "--poison", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "PASS: the same greedy tokens as transformers"
    assert out.count("identical\n") == 5  # the table, prompt by prompt
    result = json.loads(path.read_text())
    assert result["passed"]
    assert [prompt["tokens"] for prompt in result["prompts"]] == [1, 3, 12, 43, 150]
    (combination,) = result["combinations"]
    assert combination["options"]["max_num_batched_tokens"] == 16
    for prompt in combination["prompts"]:
        assert (prompt["result"], prompt["same"], prompt["largest_gap"]) == ("identical", 8, 0)
        assert 0 < prompt["logit_error"] < 1e-4  # other batch shapes round otherwise: exactly 0 would be the same pass


def test_end_of_sequence_is_a_token_like_any_other(
    tiny_directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = tmp_path / "ending"
    shutil.copytree(tiny_directory, ending)
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(211))}))
    assert len(load_model(ending).eos_token_ids) == 211
    assert main(["verify", str(ending), *FEW]) == 0
    assert len(re.findall(r" 8 .* identical$", capsys.readouterr().out, re.MULTILINE)) == 5


def test_lists_are_run_in_every_combination_on_one_answer(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    generate = Reference.generate

    def counted(self: Reference, prompt: Sequence[int], tokens: int) -> Answer:
        asked.append(len(prompt))
        return generate(self, prompt, tokens)

    monkeypatch.setattr(Reference, "generate", counted)
    lists = ["--layouts", "all", "--page-sizes", "4KiB,64KiB", "--chunk", "16,whole", "--max-num-seqs", "1,3"]
    assert main(["verify", tiny_directory, "--prompt-tokens", "1,40,9", "--max-tokens", "4", *lists]) == 0
    out = capsys.readouterr().out
    assert asked == [1, 40, 9]
    assert out.count(": 3 identical, 0 ties, 0 different") == 5 * 2 * 2 * 2
    assert "[40/40] head-major-sliced, 64KiB pages, whole prompts, 3 slots" in out
    assert out.splitlines()[-1] == "PASS: the same greedy tokens as transformers, in 40 of 40 combinations"


def test_the_sweep_is_the_grid_and_skips_what_the_budget_does_not_allow(
    tiny_directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["--prompt-tokens", "1,9", "--max-tokens", "2", "--layouts", "token-major,sliced-together"]
    assert main(["verify", tiny_directory, "--sweep", *some, "--kv-cache-memory", "3MiB"]) == 0
    out = capsys.readouterr().out
    # Six streams of 2 MiB do not fit 3 MiB, one does.
    assert out.count("token-major, 2MiB pages") == out.count("skipped: the budget of 2 MiB holds 0 tokens") == 4
    assert out.count(": 2 identical") == 20
    assert out.splitlines()[-1].endswith("in 20 of 20 combinations; 4 skipped")


@pytest.mark.parametrize("chunk", ["8", "whole"])
def test_a_mistake_in_attention_is_found(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, chunk: str
) -> None:
    right = sdpa.prepare

    def wrong(*args: Any, **kwargs: Any) -> Any:
        attend = right(*args, **kwargs)
        return lambda query, keys, values, asked: attend(
            query, keys, values, replace(asked, scaling=asked.scaling * 1.05)
        )

    usual = Runner.__init__.__kwdefaults__
    monkeypatch.setattr("vattention.engine.runner.Runner.__init__.__kwdefaults__", {**usual, "kernel": wrong})
    assert main(["verify", tiny_directory, *FEW, "--chunk", chunk, "--max-num-seqs", "4"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT" in out
    assert out.splitlines()[-1].startswith("FAIL")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--dtype", "bfloat16"], "in bfloat16 the rounding"),
        (["--layouts", "sideways"], "--layouts sideways: known are token-major"),
        (["--layouts", "all", "--head-major"], "leave the flags of a single one out"),
        (["--prompt-tokens", "250"], "248 tokens at most"),
        (["--prompt-tokens", "0"], "at least one token"),
        (["--prompts", "0"], "at least 1"),
        (["--max-tokens", "0"], "at most"),
        (["--page-size", "2MiB", "--kv-cache-memory", "3MiB"], "holds 0 tokens"),
        (["--page-sizes", "2MiB,4MiB", "--kv-cache-memory", "3MiB"], "none of the combinations"),
        (["--chunk", "2", "--max-num-seqs", "4"], "max_num_batched_tokens=2"),
        (["--json", "/nowhere/v.json"], "cannot write"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(["verify", tiny_directory, *FEW, *arguments]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert len(err.splitlines()) == 1


def test_another_dtype_needs_to_be_told_what_to_accept(tiny_directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*FEW, "--dtype", "bfloat16", "--tie-gap", "0.5", "--chunk", "16"]
    assert main(["verify", tiny_directory, *given, "--logit-error", "0.5"]) == 0
    assert main(["verify", tiny_directory, *given, "--logit-error", "1e-6"]) == 1
    assert "logits, by more than 1.0e-06 of their spread" in capsys.readouterr().out


# -- its parts ------------------------------------------------------------------------------------------------------


class Taught:
    """A reference that says the same whatever it is taught."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = torch.tensor(rows)

    def teacher_forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        return self.rows[: len(tokens)]


A, B, TIE, NAN = [9.0, 0.0, 1.0], [0.0, 9.0, 1.0], [5.0, 5.0001, 0.0], [float("nan")] * 3


def verdict(theirs: list[tuple[int, list[float]]], ours: list[tuple[int, list[float]]], taught: Taught) -> Any:
    answers = [Answer(tuple(t for t, _ in side), torch.tensor([row for _, row in side])) for side in (theirs, ours)]
    return judge(taught, (1, 2), *answers, tie_gap=2e-4, logit_error=1e-3)  # type: ignore[arg-type]


def test_the_same_tokens_are_identical() -> None:
    found = verdict([(0, A), (1, TIE), (0, A)], [(0, A), (1, TIE), (0, A)], Taught())
    assert found.result == "identical"


def test_a_tie_is_a_tie_and_what_follows_is_checked() -> None:
    theirs = [(0, A), (1, TIE), (1, B)]
    ours = [(0, A), (0, TIE), (0, A)]  # after another token the reference itself would go on otherwise
    found = verdict(theirs, ours, Taught(A, TIE, A))
    assert found.result == "tie at token 2, 1.0e-04 apart"
    assert (found.same, found.differs, found.identical) == (1, None, False)
    found = verdict(theirs, ours, Taught(A, TIE, B))
    assert found.result == "DIFFERENT: token 3, 9.0e+00 apart"


def test_the_tie_is_judged_by_the_logits_that_the_reference_chose_from() -> None:
    found = verdict([(0, A), (1, TIE)], [(0, A), (0, TIE)], Taught(A, [5.0, 5.1, 0.0]))
    assert found.result.startswith("tie at token 2")
    found = verdict([(0, A), (1, B)], [(0, A), (0, B)], Taught(A, TIE))
    assert found.result == "DIFFERENT: token 2, 9.0e+00 apart"


@pytest.mark.parametrize(
    ("ours", "problem"),
    [
        ([(0, A)], "1 tokens for 2"),
        ([], "no tokens"),
        ([(0, A), (0, [9.1, 0.0, 1.0])], "logits, by more than"),
        ([(0, A), (0, NAN)], "logits, by more than"),
    ],
)
def test_what_is_not_the_same_is_different(ours: list[tuple[int, list[float]]], problem: str) -> None:
    assert problem in verdict([(0, A), (0, A)], ours, Taught(A, A)).result


def test_a_reference_without_numbers_passes_nothing() -> None:
    assert verdict([(0, A), (0, NAN)], [(0, A), (0, NAN)], Taught()).differs


def test_the_reference_uses_nothing_of_ours_and_gives_the_model_back(tiny_directory: str) -> None:
    loaded = load_model(tiny_directory)
    reference = Reference(loaded)
    answer = reference.generate((5, 6, 7), 6)
    assert len(answer.tokens) == 6
    assert answer.logits.shape == (6, 211)
    assert answer.logits.argmax(dim=-1).tolist() == list(answer.tokens)
    taught = reference.teacher_forced((5, 6, 7), answer.tokens)
    assert torch.allclose(taught, answer.logits, atol=1e-3)
    assert loaded.model.config._attn_implementation == NAME  # type: ignore[union-attr]


def test_lengths_are_spread_from_one_to_the_longest() -> None:
    lengths = spread(20, 3000)
    assert (lengths[0], lengths[-1], len(lengths)) == (1, 3000, 20)
    assert lengths == sorted(lengths)
    assert spread(1, 7) == [7]
    with pytest.raises(ConfigError):
        spread(3, 0)


def test_prompts_are_random_ids_and_text_in_turn_and_never_change() -> None:
    class Letters:
        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoding", (), {"input_ids": [ord(letter) % 100 for letter in text]})

    prompts = make_prompts([3, 50, 4, 60], 100, Letters(), seed=5)
    assert [prompt.kind for prompt in prompts] == ["random", "text", "random", "text"]
    assert [len(prompt.token_ids) for prompt in prompts] == [3, 50, 4, 60]
    assert prompts == make_prompts([3, 50, 4, 60], 100, Letters(), seed=5)
    assert prompts != make_prompts([3, 50, 4, 60], 100, Letters(), seed=6)
    assert {prompt.kind for prompt in make_prompts([3, 50], 100, None, seed=5)} == {"random"}

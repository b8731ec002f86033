"""Every option of sampling against its definition, all options side by side in one batch."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from support.sampling import adjusted, chi_square, probabilities
from vattention.engine import sampler
from vattention.engine.adjustment import Adjuster, Seen, adjust
from vattention.engine.sampler import Row, sample
from vattention.engine.sampling_params import SamplingParams

VOCABULARY = 400  # more than truncation looks at first
PROMPT, OUTPUT, ENDS = (3, 3, 5, 90, 399), (5, 7, 7, 7, 250), frozenset({0, 11})
# Of the second kind of row a few tokens have most of the mass; of the first none has, so that top-p needs nearly all.
SPREADS = (0.5, 3.0)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 300},
    {"top_k": -1},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"top_p": 0.999},
    {"top_k": 20, "top_p": 0.5},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.05, "top_k": 8, "top_p": 0.8, "temperature": 1.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -1.1},
    {"logit_bias": {9: 4.0, 5: -100.0, 399: 2.0}},
    {"min_tokens": 6},
    {"min_tokens": 5},
    {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "logit_bias": {7: 3.0},
        "top_p": 0.8,
    },
    {"repetition_penalty": 2.0, "temperature": 0.0},
    {"logit_bias": {11: 50.0}, "min_tokens": 6, "temperature": 0.0},
]


def logits_for(option: int, *, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(option)
    logits = torch.randn(VOCABULARY, generator=generator) * spread
    logits[[5, 7, 90]] = torch.tensor([2.0, 3.0, -1.0])  # tokens with penalties matter, on both sides of zero
    logits[[0, 11]] = 2.5
    return logits


def row(params: SamplingParams, position: int, seed: int = 0) -> Row:
    adjuster = Adjuster.needed(PROMPT, params, ENDS)
    return Row(params, seed, position, adjustment=None if adjuster is None else adjuster.next(OUTPUT))


def exact(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    return probabilities(adjusted(logits.double().tolist(), params, PROMPT, OUTPUT, ENDS), params)


def draw_together(
    options: Sequence[dict[str, Any]], draws: int, spread: float
) -> list[tuple[SamplingParams, torch.Tensor, list[int]]]:
    """`draws` rows of each option in one batch, in turns."""
    cases = [(SamplingParams(**o), logits_for(i, spread=spread)) for i, o in enumerate(options)]
    rows = [row(params, position, seed=i) for position in range(draws) for i, (params, _) in enumerate(cases)]
    tokens = sample(torch.stack([logits for _, logits in cases]).repeat(draws, 1), rows)
    return [(params, logits, tokens[i :: len(cases)]) for i, (params, logits) in enumerate(cases)]


@pytest.mark.parametrize("spread", SPREADS)
def test_counts_are_those_of_the_definition(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced numbers instead of random ones: each count is the expected one, give or take one."""
    draws = 1000

    def even(seeds: Any, samples: Any, positions: Any) -> Any:
        return (np.array(positions) + 0.5) / draws

    monkeypatch.setattr(sampler, "uniform", even)
    for params, logits, tokens in draw_together(OPTIONS, draws, spread):
        expected, counts = exact(logits, params), Counter(tokens)
        assert set(counts) <= set(expected), params
        for token, probability in expected.items():
            assert abs(counts[token] - probability * draws) < 1 + 1e-6, (params, token)


@pytest.mark.parametrize("spread", SPREADS)
def test_random_draws_follow_the_definition(spread: float) -> None:
    """Chi-square; the numbers are the same every time, so this cannot fail now and then."""
    for params, logits, tokens in draw_together(OPTIONS, 1000, spread):
        assert chi_square(tokens, exact(logits, params)) < 3.3, params  # once in two thousand


def test_the_test_would_see_another_distribution() -> None:
    """The control of chi-square: the draws of each option do not pass for those of a slightly different one."""
    for option, other in [
        ({"temperature": 1.0}, {"temperature": 1.1}),
        ({"top_k": 30}, {"top_k": 31}),
        ({}, {"top_p": 0.99}),
    ]:
        (_, logits, tokens), *_ = draw_together([option], 20_000, 1.0)
        assert chi_square(tokens, exact(logits, SamplingParams(**option))) < 3.3
        assert chi_square(tokens, exact(logits, SamplingParams(**other))) > 5


def test_adjusted_logits_are_those_of_the_formulas() -> None:
    """To the last digits, above and below zero: what a penalty does to an unlikely token hardly shows in counts."""
    cases = [(SamplingParams(**o), logits_for(i, spread=3.0).double()) for i, o in enumerate(OPTIONS)]
    changes = [(row(params, 0).adjustment, params, logits) for params, logits in cases]
    wanted = [(change, params, logits) for change, params, logits in changes if change is not None]
    assert len(wanted) > 9
    together = torch.stack([logits for _, _, logits in wanted])
    adjust(together, [change for change, _, _ in wanted])
    for got, (_, params, logits) in zip(together, wanted, strict=True):
        expected = torch.tensor(adjusted(logits.tolist(), params, PROMPT, OUTPUT, ENDS), dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", range(len(OPTIONS)))
def test_a_row_is_the_same_alone_and_in_company(option: int) -> None:
    """Whoever is beside it, and however much they make truncation look at."""
    params = SamplingParams(**OPTIONS[option])
    logits = logits_for(option, spread=1.0)
    alone = [sample(logits[None], [row(params, position)])[0] for position in range(40)]
    others = [row(SamplingParams(**other), 1000 + i) for i, other in enumerate(OPTIONS)]
    company = torch.stack([logits_for(50 + i, spread=0.3) for i in range(len(others))])
    mine = [row(params, position) for position in range(40)]
    together = sample(torch.cat([company, logits.expand(40, -1), company]), [*others, *mine, *others])
    assert together[len(others) : len(others) + 40] == alone


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 3}, [1, 0, 2]),
        ({"top_k": 2}, [1, 0]),
        ({"top_p": 0.5}, [1, 0]),
        ({"top_p": 0.99}, [1, 0, 2, 4, 5]),
        ({"top_k": 4, "top_p": 0.99}, [1, 0, 2, 4]),
    ],
)
def test_of_equally_likely_tokens_the_first_are_kept(params: dict[str, Any], kept: list[int]) -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, -9.0, 1.0, 1.0])
    params_ = SamplingParams(**params)
    assert list(probabilities(logits.tolist(), params_)) == kept, "the reference agrees"
    tokens = sample(logits.expand(500, -1), [Row(params_, 0, i) for i in range(500)])
    assert set(tokens) == set(kept)


def test_logits_that_are_all_equal() -> None:
    tokens = sample(torch.zeros(200, 1000), [Row(SamplingParams(top_p=0.5), 1, i) for i in range(200)])
    assert max(tokens) < 500
    assert len(set(tokens)) > 100


def test_extreme_settings_stay_finite() -> None:
    """Nothing a single request may ask for can make an error of a whole batch."""
    for options in (
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1.7e308},
        {"repetition_penalty": 1e-300, "temperature": 5e-324},
        {"top_p": 5e-324},
        {"min_p": 5e-324, "temperature": 1e300},
        {"logit_bias": dict.fromkeys(range(VOCABULARY), -100)},
        {"frequency_penalty": 2, "logit_bias": {0: 100}, "min_tokens": 9},
    ):
        params = SamplingParams(**options)
        (token,) = sample(logits_for(0, spread=3.0)[None], [row(params, 1)])
        assert 0 <= token < VOCABULARY


def test_logits_are_not_changed() -> None:
    logits = logits_for(0, spread=1.0)[None].repeat(len(OPTIONS), 1)
    before = logits.clone()
    sample(logits, [row(SamplingParams(**option), i) for i, option in enumerate(OPTIONS)])
    assert torch.equal(logits, before)


def test_a_greedy_batch_pays_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("adjust", "truncate", "uniform", "_draw"):
        monkeypatch.setattr(sampler, name, None)
    greedy = SamplingParams(temperature=0, top_k=5, top_p=0.1)
    assert sample(torch.eye(3), [Row(greedy, 0, i) for i in range(3)]) == [0, 1, 2]


def test_tokens_seen_are_counted_as_they_come() -> None:
    """However the tokens are cut into calls, the counts are those of all of them."""
    generator = np.random.default_rng(0)
    prompt, output = generator.integers(0, 300, 50).tolist(), generator.integers(0, 300, 400).tolist()
    seen = Seen(prompt)
    for cut in (0, 1, 2, 50, 51, 399, 400, 400):
        seen.catch_up(output[:cut])
    expected = {**dict.fromkeys(prompt, 0), **Counter(output)}
    assert dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True)) == expected

"""What sampling means, written down token by token in plain Python, and how far counts may be from it."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from vattention.engine.sampling_params import SamplingParams


def adjusted(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int], ends: Collection[int]
) -> list[float]:
    """Logits after bias, penalties and the tokens that may not come yet."""
    counts = Counter(output)
    result = []
    for token, logit in enumerate(logits):
        logit += (params.logit_bias or {}).get(token, 0.0)
        if token in counts or token in prompt:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * counts[token]
        if counts[token]:
            logit -= params.presence_penalty
        if token in ends and len(output) < params.min_tokens:
            logit = -math.inf
        result.append(logit)
    return result


def probabilities(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """The exact renormalised distribution of the token that is drawn from adjusted logits."""
    top = max(logits)
    if params.temperature == 0:
        return {logits.index(top): 1.0}
    weights = {token: math.exp((logit - top) / params.temperature) for token, logit in enumerate(logits)}
    weights = {token: weight for token, weight in weights.items() if weight >= params.min_p}
    order = sorted(weights, key=lambda token: (-weights[token], token))
    if params.top_k > 0:
        order = order[: params.top_k]
    total = math.fsum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= params.top_p * total and params.top_p < 1:
            break
        kept.append(token)
        mass += weights[token]
    mass = math.fsum(weights[token] for token in kept)
    return {token: weights[token] / mass for token in kept}


def chi_square(tokens: Sequence[int], expected: Mapping[int, float]) -> float:
    """How unlikely the counts of `tokens` are, as a standard normal number; infinite for a token that cannot come.

    Tokens expected less than five times are counted together. Wilson and Hilferty's approximation of the distribution.
    """
    counts, draws = Counter(tokens), len(tokens)
    if not set(counts) <= set(expected):
        return math.inf
    bins = [(counts[token], p * draws) for token, p in expected.items() if p * draws >= 5]
    rare = [(counts[token], p * draws) for token, p in expected.items() if p * draws < 5]
    if rare and sum(p for _, p in rare) >= 5:
        bins.append((sum(n for n, _ in rare), sum(p for _, p in rare)))
    freedom = len(bins) - 1
    if freedom < 1:
        return 0.0
    statistic = sum((n - e) ** 2 / e for n, e in bins)
    variance = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)

"""Sinks, for kernels that have none: from what attention without them returns."""

from __future__ import annotations

import torch


def weigh(out: torch.Tensor, logsumexp: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Attention as if each row had one more key, of score `sinks` and of value zero.

    That key takes its share of the softmax from all others alike, so the output shrinks by
    exp(logsumexp) / (exp(logsumexp) + exp(sink)), which is the logistic function of their difference.

    Args:
        out: `[rows, q_heads, width]`.
        logsumexp: natural, of each row's scores, `[rows, q_heads]`.
        sinks: `[q_heads]`.
    """
    share = torch.sigmoid(logsumexp.float() - sinks.float())
    return (out.float() * share[:, :, None]).to(out.dtype)

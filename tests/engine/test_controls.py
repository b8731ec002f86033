"""That the small models see: without a feature in the reference, the comparison of test_models.py would fail."""

import functools

import pytest
import torch

from support.controls import EVERYWHERE, LONG, Prompt, called, controls_of, patched, rebuilt, reference
from support.models import TOLERANCE, features_of, one_pass, relative_error, shared
from vattention.engine.architectures import ACCEPTED

SEEN = 100 * TOLERANCE
"""A change of the logits that no comparison passes."""


@functools.cache
def ours(model_type: str, prompt: Prompt) -> torch.Tensor:
    """Our logits after a prompt, which are those of the unchanged reference."""
    model = shared(model_type)
    logits = one_pass(model, prompt)[-1:]
    assert relative_error(logits, reference(model, prompt)) < TOLERANCE
    return logits


@pytest.mark.parametrize("model_type", sorted(ACCEPTED))
def test_a_reference_without_the_feature_fails_the_comparison(model_type: str) -> None:
    off = {feature: control() for feature, control in controls_of(model_type).items()}
    moved = {feature: relative_error(ours(model_type, prompt), logits) for feature, (prompt, logits) in off.items()}
    blind = [feature for feature, error in moved.items() if not error > SEEN]
    assert not blind, f"{model_type} does not see {blind}: make its small model stronger"


def test_every_feature_asked_of_attention_has_a_control() -> None:
    """What layers ask for is seen in their calls, what is switched off comes from configurations and modules."""
    names = {
        "softcap": "soft cap",
        "window": "sliding window",
        "multi-query": None,
    }  # every query reads the one head: nothing to confuse
    for model_type in sorted(ACCEPTED):
        asked = {names.get(feature, feature) for feature in features_of(model_type)} - {None}
        assert asked | set(EVERYWHERE) <= set(controls_of(model_type)), model_type


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "mimo_v2_flash"])
def test_a_control_that_switches_nothing_off_moves_nothing(model_type: str) -> None:
    """The other way round: it is the feature that moves the logits, and not how a control computes them."""
    expected = reference(shared(model_type), LONG)
    for _, logits in (
        rebuilt(model_type, {}),
        patched(model_type, lambda model: None),
        called(model_type, lambda call: call),
    ):
        assert torch.equal(logits, expected)

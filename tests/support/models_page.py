"""docs/models.md, from the tables of the engine and from what the small models of the tests ask of attention.

`PYTHONPATH=src:tests python -m support.models_page` writes it; tests/engine/test_architectures.py compares.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from transformers import __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.controls import EVERYWHERE, controls_of
from support.models import COMMON
from vattention.engine.architectures import ACCEPTED, REFUSED, WINDOW_IN_MASK

_HEAD = """# Models

<!-- Written by tests/support/models_page.py from the engine's tables. Do not edit: a test compares. -->

The engine runs the model definitions of transformers unmodified and replaces their attention. An architecture is
accepted when a small random model of it, made so that a mistake would show, gives the same logits (to 1e-4 of their
spread, in float32) and the same greedy tokens as transformers. Everything else is refused with the reason, before any
weight is loaded. Of the causal language models of transformers {version}, {accepted} are accepted and {refused}
refused; {aliases} is configured as one of the others.

Configurations of an accepted architecture are refused where they ask for more than was compared: RoPE of kind
"dynamic" or "longrope" (its frequencies depend on the longest request of a batch), layers with other than full or
sliding attention, bidirectional or cross-attention, layers that share K and V.

## Quantised weights

Compared with transformers on the same quantised files, on a CPU:

| weights | what happens | needs |
| --- | --- | --- |
| GGUF | dequantised on loading: they take the memory of the full weights, and must fit | gguf, accelerate |
| fp8 in blocks with scales (DeepSeek-V3, Qwen3) | dequantised on loading | accelerate |
| mxfp4 (GPT-OSS) | dequantised on loading | accelerate |
| compressed-tensors, weights only | as transformers does | accelerate, compressed-tensors |
| torchao, `Int8WeightOnlyConfig` | kept in 8 bits | accelerate, torchao |
| bitsandbytes, 4 bits | kept in 4 bits; rounds inside like bfloat16 | accelerate, bitsandbytes |

Others are refused by name: most need a GPU, and bitsandbytes in 8 bits looks for outliers over the whole batch, so that
requests would change each other. A GGUF file whose RoPE scaling transformers does not read is refused too; that of
Llama 3 is recognised and applied.

## Accepted

How an architecture was verified:

- **batch**: four requests of 1 to 90 tokens at once, prefill in chunks of 16 together with decodes, NaN in all mapped
  memory past each request.
- **every way**: that, and alone, in one ragged batch, in chunks of 11, with memory that takes preemption, in guard
  mode, in poison mode, and with layers sharing streams.

Each feature in the third column is also switched off once, in transformers and not here, and the comparison must fail
by a hundred times what it passes: that is how we know that the small model would show a mistake. So must three of
every type: tokens without their positions, tokens that see later ones, and two requests taken for one text. These are
{controls} controls, of {accepted} types.

| model type | class in transformers | features, each with a control | verified |
| --- | --- | --- | --- |
"""

_MASK = """
`{kinds}` keep their sliding window to transformers' mask and do not tell attention of it: they are
served up to the window, where it changes nothing, and refused beyond.

## Refused

| model type | because |
| --- | --- |
"""


def page() -> str:
    """The text of docs/models.md."""
    types = {kind: CONFIG_MAPPING[kind].model_type for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    here = {kind for kind in types if kind in REFUSED}
    known = {kind: name for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind in ACCEPTED}
    accepted = sum(model_type in ACCEPTED for model_type in types.values())
    aliases = ", ".join(kind for kind in types if kind not in here and kind not in known)
    head = _HEAD.format(
        version=__version__,
        accepted=accepted,
        refused=len(types) - accepted,
        aliases=aliases,
        controls=sum(len(controls_of(kind)) for kind in known),
    )
    kinds = "`, `".join(sorted(WINDOW_IN_MASK))
    return head + "".join(_accepted(known)) + _MASK.format(kinds=kinds) + "".join(_refused(here))


def _accepted(known: dict[str, str]) -> Iterator[str]:
    for kind in sorted(known):
        features = sorted(set(controls_of(kind)) - set(EVERYWHERE), key=str.lower)
        verified = "every way" if kind in COMMON else "batch"
        yield f"| {kind} | {known[kind]} | {', '.join(features) or 'plain'} | {verified} |\n"


@functools.cache
def _by_reason() -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for kind in sorted(REFUSED):
        reasons.setdefault(REFUSED[kind], []).append(kind)
    return reasons


def _refused(here: set[str]) -> Iterator[str]:
    for reason, kinds in _by_reason().items():
        names = [kind for kind in kinds if kind in here]
        if names:
            yield f"| {', '.join(names)} | {reason} |\n"


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "models.md").write_text(page())

"""Every causal language model of the installed transformers is accepted or refused with a reason, by name."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.models import tiny_config
from support.models_page import page
from vattention.cache.layout import LayerShape
from vattention.engine.architectures import ACCEPTED, REFUSED, WINDOW_IN_MASK
from vattention.engine.judge import Geometry, judge
from vattention.errors import UnsupportedModel

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def default_config(model_type: str) -> Any:
    """The defaults of a type; for the one whose defaults transformers itself refuses, the type and nothing else."""
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception:
        return SimpleNamespace(model_type=CONFIG_MAPPING[model_type].model_type)


def test_every_class_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    accepted, refused = [], []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = default_config(model_type)
        assert (config.model_type in ACCEPTED) != (config.model_type in REFUSED), f"{model_type} is in no table"
        try:
            assert isinstance(judge(config), Geometry)
            accepted.append(model_type)
        except UnsupportedModel as error:
            assert len(str(error)) > len(model_type) + 20, "a reason"
            refused.append(model_type)
            assert config.model_type in REFUSED
    with capsys.disabled():
        print(f"\n{len(accepted)} accepted, {len(refused)} refused of transformers {transformers.__version__}")
    assert len(accepted) + len(refused) == len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_position_bias_is_refused_by_name() -> None:
    """ALiBi and its like, found in the sources: what passes a bias to attention, and what computes one by itself."""
    biased = set()
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module = importlib.util.find_spec(getattr(transformers, name).__module__)
        assert module is not None
        assert module.origin is not None
        if re.search(r"\b(position_bias=|build_alibi|build_mpt_alibi|rel_attn_core)", Path(module.origin).read_text()):
            biased.add(model_type)
            assert "position bias" in REFUSED[model_type], model_type
    assert biased >= {"bloom", "falcon", "mpt", "inkling_text", "inkling2_text", "cpmant", "xlnet"}


def test_the_tables_name_nothing_else() -> None:
    if transformers.__version__ != "5.23.0":
        pytest.skip("the tables were written against transformers 5.23.0")
    assert {*ACCEPTED, *REFUSED} <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(ACCEPTED) & set(REFUSED)
    assert set(ACCEPTED) >= WINDOW_IN_MASK


def test_no_configuration_crashes_the_judge() -> None:
    """Not only those of causal language models: somebody will give the directory of any of them."""
    for model_type in CONFIG_MAPPING:
        config = default_config(model_type)
        if config.model_type not in ACCEPTED:
            with pytest.raises(UnsupportedModel):
                judge(config)


def test_shapes_that_are_not_uniform() -> None:
    mimo = judge(tiny_config("mimo_v2_flash")).shapes
    assert mimo == (LayerShape(2, 8, 6), LayerShape(1, 8, 6), LayerShape(2, 8, 6))
    assert judge(tiny_config("gemma4_text")).shapes == (LayerShape(2, 8, 8), *[LayerShape(2, 16, 16)] * 2)
    assert set(judge(tiny_config("deepseek_v3")).shapes) == {LayerShape(6, 12, 6)}
    assert set(judge(tiny_config("gpt_bigcode")).shapes) == {LayerShape(1, 8, 8)}


def test_the_page_is_what_the_tables_say() -> None:
    assert page() == DOCS.read_text(), "write it anew: PYTHONPATH=src:tests python -m support.models_page"

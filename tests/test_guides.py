"""The examples of the README and of docs/transformers.md run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from support.models import tiny_model
from support.tokenizers import byte_level

ROOT = Path(__file__).parents[1]


def blocks(path: str) -> list[str]:
    """The Python in a guide that has to do with VirtualCache."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
    return [block for block in found if "VirtualCache" in block or ("cache." in block and path != "README.md")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tokenizer = byte_level()
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=2)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    inputs = tokenizer(["Hello world", "stop"], padding=True, padding_side="left", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return {
        "directory": str(directory),
        "model": model,
        "inputs": inputs,
        "ids": inputs["input_ids"][:1],
        "torch": torch,
    }


def test_the_readme(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("README.md")
    namespace: dict[str, Any] = {}
    exec(block.replace("path/to/model", world["directory"]), namespace)
    assert namespace["output"].shape[0] == 2
    assert "CacheStats(" in capsys.readouterr().out
    assert namespace["cache"].closed


def test_the_guide(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    first, many, see = blocks("docs/transformers.md")
    namespace = dict(world)
    exec(first, namespace)
    assert namespace["output"].shape[1] > world["inputs"]["input_ids"].shape[1]
    exec(many, namespace)
    with namespace["VirtualCache"](world["model"].config) as cache:
        exec(see, {**namespace, "cache": cache})
    assert "created=0" in capsys.readouterr().out

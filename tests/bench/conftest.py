from pathlib import Path

import pytest

from support.models import tiny_model


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model on disk, without a tokenizer."""
    path: Path = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(path)
    return str(path)

"""Whether there is a C++ compiler."""

import pytest

from vattention.attention import native


def has_compiler() -> bool:
    """Whether kernels can be compiled here."""
    try:
        return bool(native.find_compiler())
    except FileNotFoundError:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

"""Memory in huge pages: tensors that do not touch each other, asked for where they can be had."""

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vattention.engine import huge_pages


@given(st.lists(st.tuples(st.integers(0, 100_000), st.sampled_from([torch.bfloat16, torch.float32])), max_size=12))
def test_tensors_are_apart(asked: list[tuple[int, torch.dtype]]) -> None:
    tensors = [huge_pages.empty(numel, dtype) for numel, dtype in asked]
    for number, (tensor, (numel, dtype)) in enumerate(zip(tensors, asked, strict=True)):
        assert tensor.shape == (numel,)
        assert tensor.dtype == dtype
        assert numel == 0 or tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert (tensor == number).all()


def test_one_larger_than_a_stretch_leaves_the_rest_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_left", torch.empty(0, dtype=torch.uint8))
    before = huge_pages.empty(64, torch.uint8)
    large = huge_pages.empty(huge_pages._STRETCH + 1, torch.uint8)
    after = huge_pages.empty(64, torch.uint8)
    large.fill_(1)
    assert len(large) == huge_pages._STRETCH + 1
    assert after.data_ptr() - before.data_ptr() == 64


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a kernel without huge pages")
def test_the_kernel_is_asked_for_huge_pages() -> None:
    address = huge_pages.empty(4 << 20, torch.uint8).data_ptr()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):  # a mapping begins: its addresses
            start, end = (int(number, 16) for number in name.split("-"))
            inside = start <= address < end
        elif inside and name == "VmFlags:":
            assert "hg" in values
            return
    pytest.fail("memory that no mapping holds")


@pytest.mark.parametrize("what", ["no such pages", "no memory"])
def test_without_them_memory_is_ordinary(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "no such pages":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    else:

        def refuse(*_: object, **__: object) -> None:
            raise OSError("out of memory")

        monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(huge_pages, "_left", torch.empty(0, dtype=torch.uint8))
    assert huge_pages.empty(1000, torch.float32).fill_(2).sum() == 2000

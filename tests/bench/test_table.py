from vattention.bench.table import table


def test_columns_are_aligned() -> None:
    assert table(("name", "size"), [("a", 1), ("longer", 1000)]) == "\n".join(
        ["name    size", "------  ----", "a          1", "longer  1000"]
    )


def test_a_header_of_nothing_is_left_out() -> None:
    assert table(("", ""), [("a", "b"), ("cc", "d")], left=2) == "a   b\ncc  d"

"""Plain text tables, for a terminal or a pasted report."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """Aligned columns under a header and a rule; the first `left` columns are flush left, the others right.

    A header of empty strings is left out, with its rule.
    """
    body = [[str(cell) for cell in row] for row in rows]
    lines = [list(header), *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    head = [line(header), "  ".join("-" * width for width in widths)] if any(header) else []
    return "\n".join([*head, *map(line, body)])

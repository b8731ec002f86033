"""How large a regular expression is once its repetitions are written out."""

from __future__ import annotations

import re

_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_HUGE = 10**9


def regex_size(regex: str) -> int:
    """Characters, classes and escapes in `regex`, each as often as bounded repetitions around it say; 1e9 at most.

    `(a{10}b){5}` has 55. An estimate: the expression need not be one, and what is not understood counts by its length.
    """
    sizes = [0]  # of the groups that are open, the outermost first
    last = 0  # of what a repetition here would repeat
    at = 0
    while at < len(regex):
        repeat = _REPEAT.match(regex, at)
        if repeat is not None:
            counts = [min(_HUGE, int(number[:10])) for number in repeat.groups() if number]
            more = last * (max(counts, default=1) - 1)
            sizes[-1] = min(_HUGE, sizes[-1] + max(0, more))
            last = min(_HUGE, last + max(0, more))
            at = repeat.end()
            continue
        char = regex[at]
        if char == "(":
            sizes.append(0)
            last = 0
        elif char == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] = min(_HUGE, sizes[-1] + last)
        elif char not in "*+?":
            at = _end_of_class(regex, at) if char == "[" else at + (char == "\\")
            sizes[-1] += 1
            last = 1
        at += 1
    return min(_HUGE, sum(sizes))


def _end_of_class(regex: str, at: int) -> int:
    """Where the `]` is that belongs to the `[` at `at`; the end where there is none. Classes may hold classes."""
    depth, start = 0, at
    while at < len(regex):
        if regex[at] == "\\":
            at += 1
        elif regex[at] == "[":
            depth += 1
            if regex[at + 1 : at + 2] == "^":
                at += 1
            if regex[at + 1 : at + 2] == "]":  # the first one stands for itself
                at += 1
        elif regex[at] == "]":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return max(start, len(regex) - 1)

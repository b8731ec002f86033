"""Decode passes on a CPU without Python: calls written down once, and made again on the same addresses.

What a CUDA graph is on a GPU. A pass over a few requests is some three hundred calls of small compiled functions, and
calling them through Python and torch takes as long as some of their arithmetic. All addresses stay (those of K and V
for life, those of numbers that change in `attention.decode_batch`), so one pass is watched while it runs
(`engine.cpu_recorder`). What lies between calls is memory that the recording hands out, and takes back when a tensor
dies (`engine.cpu_memory`), so that a pass uses the same few buffers layer after layer. What is replayed is a program
(`engine.cpu_program`).

A recording must give the logits of an ordinary pass, bit for bit: once with garbage in all its buffers, and then again
the first times that it is used, for other tokens. A pass that asks a tensor for a number, or runs what cannot be
watched, is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vattention.attention.recording import CannotRecord
from vattention.engine import cpu_program
from vattention.engine.cpu_recorder import Recorder
from vattention.engine.graphs import Captured

MOST_ROWS = 32
"""Passes of more rows are not recorded: beside their arithmetic, what calls take is little."""

_PROOFS = 2
"""Replays that are compared to an ordinary pass. The first may be of the pass that was recorded."""


class CpuCapture:
    """Implements `engine.graphs.Capture` on a CPU."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        """Run `work`, record it, and see that the recording does the same.

        Raises:
            CannotRecord: it does not, or cannot be recorded. So may the first replays.
        """
        if not cpu_program.works():
            raise CannotRecord("there is no compiler")
        expected = work().clone()
        recorder = Recorder()
        with recorder.watching():
            output = work()
        replay = recorder.program()
        recorder.spoil()
        replay()
        _compare(output, expected)
        unproven = _PROOFS

        def proving() -> None:
            nonlocal unproven
            if not unproven:
                replay()
                return
            expected = work().clone()
            replay()
            _compare(output, expected)
            unproven -= 1

        return Captured(proving, output)


def _compare(output: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(output, expected):
        raise CannotRecord("a replay computes something else")

"""`vattention verify`: the tokens and logits of the engine against those of transformers."""

from __future__ import annotations

import argparse
from typing import Any

from vattention.cli.options import (
    CHECKS,
    LAYOUT,
    add_capacity,
    add_checks,
    add_command,
    add_layout,
    add_model,
    filled,
    given,
    numbers,
    words,
)
from vattention.errors import ConfigError


def add_to(commands: Any) -> None:
    """Add the command."""
    about = "compare greedy tokens and logits with transformers' own generate, prompt by prompt"
    parser = add_command(commands, "verify", run, about, _MORE)
    add = parser.add_argument
    add_model(parser, dtype="float32")
    add("--prompts", type=int, metavar="N", help="number of prompts (20)")
    add("--longest", type=int, metavar="N", help="tokens of the longest prompt; the shortest has one (3000)")
    add("--prompt-tokens", type=numbers, metavar="N,...", help="the lengths of the prompts themselves")
    add("--max-tokens", type=int, metavar="N", help="tokens to generate for each, and compare (32)")
    add("--seed", type=int, metavar="N", help="of the prompts (0)")
    add("--attention", choices=("sdpa", "eager"), help="of the reference (sdpa)")
    add("--tie-gap", type=float, metavar="X", help="logits of the reference this close are a tie (2e-4 in float32)")
    add("--logit-error", type=float, metavar="X", help="logits may differ by this share of their spread (1e-3)")
    add_capacity(parser, without=("page_size", "max_num_seqs", "max_num_batched_tokens"))
    add("--json", metavar="F", help="write the result to this file")
    add_layout(parser)
    add_checks(parser)
    lists = parser.add_argument_group("lists, of which every combination is run")
    add = lists.add_argument
    add(
        "--chunk",
        type=_chunks,
        dest="chunks",
        metavar="N,...",
        help="tokens in one forward pass (max_num_batched_tokens), or whole for all (512)",
    )
    add("--max-num-seqs", type=numbers, metavar="N,...", help="slots: requests computed at once (16)")
    add("--page-sizes", "--page-size", type=words, metavar="SIZE,...", help="such as 4KiB,2MiB (the cache chooses)")
    add(
        "--layouts",
        type=words,
        metavar="NAME,...",
        help="token-major, head-major, sliced, sliced-together, head-major-sliced, or all",
    )
    add(
        "--sweep",
        action="store_true",
        default=False,
        help="chunk 64,whole; 1,16 slots; all layouts; pages of 4KiB,64KiB,2MiB; unless another list is given",
    )


def run(args: argparse.Namespace) -> int:
    """Compare with transformers' own generate."""
    from vattention.bench.setup import EngineOptions
    from vattention.bench.verify import LAYOUTS, WHOLE, Verify
    from vattention.bench.verify import run as compare

    grid = {
        "chunks": [64, WHOLE],
        "max_num_seqs": [1, 16],
        "layouts": ["all"],
        "page_sizes": ["4KiB", "64KiB", "2MiB"],
    }
    lists = {**(grid if args.sweep else {}), **given(args, tuple(grid))}
    if lists.get("layouts") == ["all"]:
        lists["layouts"] = list(LAYOUTS)
    if unknown := set(lists.get("layouts", ())) - set(LAYOUTS):
        raise ConfigError(f"--layouts {','.join(sorted(unknown))}: known are {', '.join(LAYOUTS)}, or all")
    if "layouts" in lists and given(args, LAYOUT):
        raise ConfigError("--layouts and --sweep name whole layouts: leave the flags of a single one out")
    engine = EngineOptions(**given(args, ("max_model_len", "kv_cache_memory", *LAYOUT, *CHECKS, "device")))
    return compare(filled(Verify, args, engine=engine, **lists))


def _chunks(text: str) -> list[int]:
    """Numbers, 0 for "whole"."""
    counts = numbers(",".join("0" if part.strip() == "whole" else part for part in text.split(",")))
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"a pass has at least one token, not {min(counts)}")
    return counts


_MORE = """\
Half of the prompts are random token ids, half are English text, and all of them go through the engine together. The
reference has the same weights and answers once. Where tokens differ, it is a tie only if the reference's own logits of
the two are within --tie-gap; the tokens after it are then checked one by one, the reference being taught ours.
Exit code 1: tokens or logits differ by more than that.

examples:
  vattention verify
  vattention verify ./my-model --prompts 6 --longest 500 --chunk 64
  vattention verify --prompt-tokens 1,17,3000 --layouts all --page-sizes 4KiB,64KiB
  vattention verify --sweep --json sweep.json
"""

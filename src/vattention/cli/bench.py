"""`vattention bench`: measurements."""

from __future__ import annotations

import argparse
from typing import Any

from vattention.cli.options import (
    CAPACITY,
    LAYOUT,
    add_capacity,
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
    """Add the command, and its own."""
    about = "measurements: memory, growth, generate, driver, kernels"
    parser = commands.add_parser("bench", help=about, description="Measurements.")
    benches = parser.add_subparsers(required=True, metavar="WHAT")
    _add_memory(benches)
    _add_growth(benches)
    _add_generate(benches)
    _add_driver(benches)
    _add_kernels(benches)


def _add_memory(to: Any) -> None:
    about = "replay request lengths through a real cache, beside static reservation and paged blocks"
    parser = add_command(to, "memory", memory, about, _MEMORY)
    add = parser.add_argument
    add("--trace", metavar="CSV", help="a file of request lengths, in order of arrival")
    add("--limit-requests", type=int, metavar="N", help="of a trace, at most; 0 for all (1000)")
    add("--requests", type=int, metavar="N", help="to draw where there is no trace (1000)")
    add("--prompt-tokens", type=float, metavar="MEAN", help="of the requests drawn (1000)")
    add("--output-tokens", type=float, metavar="MEAN", help="of the requests drawn (200)")
    add("--seed", type=int, metavar="N", help="of the requests drawn (0)")
    add("--scale", type=float, metavar="X", help="multiply every length, rounding up (1)")
    add("--max-num-seqs", type=int, metavar="N", help="slots: requests live at once (32)")
    add("--memory", metavar="SIZE", help="physical budget for all layers of the model (no limit but the machine's)")
    add("--page-size", metavar="SIZE", help='such as "64KiB" (the cache chooses)')
    add(
        "--prefetch",
        action=argparse.BooleanOptionalAction,
        help="map the pages of the next step in the background, as the engine does (on)",
    )
    add("--max-ratio", type=float, metavar="X", help="fail where mapped / needed, over all steps, is more")
    add("--json", metavar="F", help="write the result to this file")
    add("--plot", metavar="F", help="draw the replay into this file (.png, .svg, .pdf)")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add(
        "--model-geometry",
        default="llama-3-8b",
        metavar="NAME",
        help="llama-3-8b, yi-6b, yi-34b or smollm2-135m (llama-3-8b)",
    )
    add("--layers", type=int, metavar="N", help="these five replace its numbers")
    add("--kv-heads", type=int, metavar="N")
    add("--head-dim", type=int, metavar="N")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of K and V (bfloat16)")
    add("--max-model-len", type=int, metavar="N", help="tokens that a slot can hold (the longest request's, if more)")
    add("--layers-replayed", type=int, metavar="K", help="layers of the real cache (2, or those of one stream)")
    add_layout(parser)


def _add_growth(to: Any) -> None:
    about = "decode with pages mapped on demand in the background, against pages mapped before"
    parser = add_command(to, "growth", growth, about, _GROWTH)
    add = parser.add_argument
    add_model(parser)
    add("--requests", type=int, metavar="N", help="that decode together (8)")
    add("--prompt-tokens", type=int, metavar="N", help="of each (128)")
    add("--output-tokens", type=int, metavar="N", help="of each (128)")
    add("--rounds", type=int, metavar="N", help="of each side (7)")
    add("--seed", type=int, metavar="N", help="of the prompts (0)")
    add("--max-overhead", type=float, metavar="X", help="share of decode time that growth may cost (0.02)")
    add_capacity(parser, without=("max_num_seqs", "max_num_batched_tokens"))
    add("--json", metavar="F", help="write the result to this file")
    add_layout(parser)


def _add_generate(to: Any) -> None:
    about = "decode under transformers' own generate(), by cache and by attention function"
    parser = add_command(to, "generate", generate, about, _GENERATE)
    add = parser.add_argument
    add_model(parser, dtype="bfloat16")
    add("--memory", action="store_true", default=argparse.SUPPRESS, help="count bytes held and moved; time nothing")
    add("--contexts", type=numbers, metavar="N,...", help="tokens before those that are decoded (2000,8000)")
    add("--batch", type=int, metavar="N", help="rows (4)")
    add("--tokens", type=int, metavar="N", help="decoded in a round of a side (8)")
    add("--rounds", type=int, metavar="N", help="of each side (5)")
    add("--min-cache", type=float, metavar="X", help="times as fast the cache alone must be (1)")
    add("--min-both", type=float, metavar="X", help="times as fast cache and attention must be together (2)")
    add("--json", metavar="F", help="write the result to this file")


def _add_driver(to: Any) -> None:
    about = "time each call of the driver, by page size"
    parser = add_command(to, "driver", driver, about, _DRIVER)
    add = parser.add_argument
    add(
        "--page-sizes",
        "--page-size",
        type=words,
        default=["4KiB", "64KiB", "2MiB"],
        metavar="SIZE,...",
        help="(4KiB,64KiB,2MiB)",
    )
    add("--json", default=None, metavar="F", help="write the result to this file")


def _add_kernels(to: Any) -> None:
    about = "time decode attention on the CPU, as a share of what the memory can deliver"
    parser = add_command(to, "kernels", kernels, about, _KERNELS)
    add = parser.add_argument
    add("--heads", type=words, metavar="Q/KVxWIDTH,...", help="query heads, KV heads, width (9/3x64,32/8x128)")
    add("--requests", type=int, metavar="N", help="that decode together (8)")
    add("--lengths", type=numbers, metavar="N,...", help="tokens of each request (512,4096)")
    add("--dtypes", "--dtype", type=words, metavar="NAME,...", help="of K and V (bfloat16,float32)")
    add("--layouts", "--layout", type=words, metavar="NAME,...", help="(token-major,head-major)")
    add("--rounds", type=int, metavar="N", help="of each side (7)")
    add("--json", metavar="F", help="write the result to this file")


def memory(args: argparse.Namespace) -> int:
    """Replay request lengths through a real cache."""
    from vattention.bench.geometry import GEOMETRIES
    from vattention.bench.memory import MemoryBench, run

    if args.model_geometry not in GEOMETRIES:
        raise ConfigError(f"--model-geometry {args.model_geometry}: known are {', '.join(GEOMETRIES)}")
    return run(filled(MemoryBench, args))


def growth(args: argparse.Namespace) -> int:
    """Decode with pages mapped on demand, against pages mapped before."""
    from vattention.bench.growth import GrowthBench, run
    from vattention.bench.setup import EngineOptions

    return run(filled(GrowthBench, args, engine=EngineOptions(**given(args, ("device", *CAPACITY, *LAYOUT)))))


def generate(args: argparse.Namespace) -> int:
    """Decode under transformers' generate(), by cache and by attention function."""
    from vattention.bench.generate import GenerateBench, run

    return run(filled(GenerateBench, args))


def driver(args: argparse.Namespace) -> int:
    """Time each call of the driver."""
    from vattention.bench.driver import report
    from vattention.memory.sizes import parse_size

    report([parse_size(size, "page_size") for size in args.page_sizes], json=args.json, command=args.command)
    return 0


def kernels(args: argparse.Namespace) -> int:
    """Time decode attention on the CPU."""
    from vattention.bench.kernels import KernelBench, run

    return run(filled(KernelBench, args))


_MEMORY = """\
A trace is a CSV file with the columns num_prefill_tokens,num_decode_tokens or ContextTokens,GeneratedTokens. Without
one, lengths are drawn from exponential distributions of the given means. Pages are really created and mapped, for some
of the model's layers, as each has the same arithmetic; K and V are never written.
Exit code 1: mapped / needed is more than --max-ratio.

examples:
  vattention bench memory --trace conversation.csv --page-size 64KiB --json result.json --plot result.png
  vattention bench memory --requests 200 --prompt-tokens 500 --output-tokens 100 --memory 8GiB
  vattention bench memory --trace papers.csv --model-geometry yi-6b --page-size 2MiB --memory 40GiB
"""

_GROWTH = """\
Rounds of both sides alternate in one process, on the same requests.
Exit code 1: the engine's thread made a driver call between two tokens, or decoding on demand took longer than
--max-overhead allows.

examples:
  vattention bench growth
  vattention bench growth --requests 4 --page-size 4KiB --rounds 9 --json growth.json
"""

_GENERATE = """\
DynamicCache and VirtualCache, each with attn_implementation="sdpa" and "vattention", take turns in one process.
Exit code 1: a bar of speed (--min-cache, --min-both) or of memory is missed.

examples:
  vattention bench generate
  vattention bench generate --contexts 500,4000 --rounds 9 --json generate.json
  vattention bench generate --memory
"""

_DRIVER = """\
examples:
  vattention bench driver
  vattention bench driver --page-sizes 64KiB,256KiB --json driver.json
"""

_KERNELS = """\
Every kernel computes all layers of a real cache, in rounds that alternate; the limit is measured in the same rounds.

examples:
  vattention bench kernels
  vattention bench kernels --heads 9/3x64 --lengths 2000 --dtypes bfloat16 --rounds 15 --json kernels.json
"""

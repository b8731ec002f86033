"""The arguments of every command, and their help.

Options are left out of the result unless they are given: defaults are stated by those who take them, and only repeated
in the help.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from vattention.cli import commands

USAGE = 2
_MODEL = "a directory, a .gguf file or a hub id; without it, the demo model (SmolLM2-135M-Instruct)"


class _Parser(argparse.ArgumentParser):
    """Bad usage in one line, and nothing for what is not given."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from vattention.bench.machine import version

        print(f"vattention {version('vattention') or '(not installed as a package)'}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. What it returns has `run`, the function of the chosen command."""
    top = _Parser(
        prog="vattention",
        description="Language models with the KV cache in virtual memory.",
        epilog="`vattention COMMAND --help` shows the options of a command, with examples.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    chosen = top.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(chosen)
    _add_info(chosen)
    _add_verify(chosen)
    bench = chosen.add_parser(
        "bench", help="measurements: memory, growth, generate, driver", description="Measurements."
    )
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    _add_bench_memory(benches)
    _add_bench_growth(benches)
    _add_bench_generate(benches)
    _add_bench_driver(benches)
    return top


def _add(to: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, more: str) -> _Parser:
    parser: _Parser = to.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=more)
    parser.set_defaults(run=run)
    return parser


def _add_generate(to: Any) -> None:
    parser = _add(to, "generate", commands.generate, "continue prompts, and show what the KV cache took", _GENERATE)
    add = parser.add_argument
    _add_model(parser)
    add("--prompt", action="append", default=None, metavar="TEXT", help="what to continue; may be repeated")
    add(
        "--prompt-file",
        action="append",
        default=None,
        metavar="F",
        help="a file whose whole text is a prompt, - for standard input; may be repeated",
    )
    add("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate at most (128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (0)")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put prompts into the model's chat template (if it has one)",
    )
    add("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, float16 or auto (auto)")
    _add_capacity(parser)
    add("--max-num-seqs", type=int, metavar="N", help="requests computed at once (16)")
    add("--page-size", metavar="SIZE", help='such as "64KiB" (the cache chooses)')
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens in one forward pass (512)")
    _add_sampling(parser)
    _add_layout(parser)


def _add_info(to: Any) -> None:
    about = "show what this machine allows: drivers, limits, memory, versions"
    parser = _add(to, "info", commands.info, about, _INFO)
    parser.add_argument("--json", action="store_true", default=False, help="print JSON, sizes in bytes")


def _add_verify(to: Any) -> None:
    about = "compare greedy tokens and logits with transformers' own generate, prompt by prompt"
    parser = _add(to, "verify", commands.verify, about, _VERIFY)
    add = parser.add_argument
    _add_model(parser)
    add("--prompts", type=int, metavar="N", help="number of prompts (20)")
    add("--longest", type=int, metavar="N", help="tokens of the longest prompt; the shortest has one (3000)")
    add("--prompt-tokens", type=_numbers, metavar="N,...", help="the lengths of the prompts themselves")
    add("--max-tokens", type=int, metavar="N", help="tokens to generate for each, and compare (32)")
    add("--seed", type=int, metavar="N", help="of the prompts (0)")
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 or auto (float32)")
    add("--attention", choices=("sdpa", "eager"), help="of the reference (sdpa)")
    add("--tie-gap", type=float, metavar="X", help="logits of the reference this close are a tie (2e-4 in float32)")
    add("--logit-error", type=float, metavar="X", help="logits may differ by this share of their spread (1e-3)")
    _add_capacity(parser)
    add("--guard", action="store_true", help="reading outside mapped memory crashes")
    add("--poison", action="store_true", help="NaN past the tokens before every pass (slow with large pages)")
    add("--json", metavar="F", help="write the result to this file")
    _add_layout(parser)
    lists = parser.add_argument_group("lists, of which every combination is run")
    add = lists.add_argument
    add(
        "--chunk",
        type=_chunks,
        dest="chunks",
        metavar="N,...",
        help="tokens in one forward pass (max_num_batched_tokens), or whole for all (512)",
    )
    add("--max-num-seqs", type=_numbers, metavar="N,...", help="slots: requests computed at once (16)")
    add("--page-sizes", "--page-size", type=_words, metavar="SIZE,...", help="such as 4KiB,2MiB (the cache chooses)")
    add(
        "--layouts",
        type=_words,
        metavar="NAME,...",
        help="token-major, head-major, sliced, sliced-together, head-major-sliced, or all",
    )
    add(
        "--sweep",
        action="store_true",
        default=False,
        help="chunk 64,whole; 1,16 slots; all layouts; pages of 4KiB,64KiB,2MiB; unless another list is given",
    )


def _add_bench_memory(to: Any) -> None:
    about = "replay request lengths through a real cache, beside static reservation and paged blocks"
    parser = _add(to, "memory", commands.bench_memory, about, _BENCH_MEMORY)
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
    _add_layout(parser)


def _add_bench_growth(to: Any) -> None:
    about = "decode with pages mapped on demand in the background, against pages mapped before"
    parser = _add(to, "growth", commands.bench_growth, about, _BENCH_GROWTH)
    add = parser.add_argument
    _add_model(parser)
    add("--requests", type=int, metavar="N", help="that decode together (8)")
    add("--prompt-tokens", type=int, metavar="N", help="of each (128)")
    add("--output-tokens", type=int, metavar="N", help="of each (128)")
    add("--rounds", type=int, metavar="N", help="of each side (7)")
    add("--seed", type=int, metavar="N", help="of the prompts (0)")
    add("--max-overhead", type=float, metavar="X", help="share of decode time that growth may cost (0.02)")
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 or auto (auto)")
    _add_capacity(parser)
    add("--page-size", metavar="SIZE", help='such as "64KiB" (the cache chooses)')
    add("--json", metavar="F", help="write the result to this file")
    _add_layout(parser)


def _add_bench_generate(to: Any) -> None:
    about = "decode under transformers' own generate(), by cache and by attention function"
    parser = _add(to, "generate", commands.bench_generate, about, _BENCH_GENERATE)
    add = parser.add_argument
    _add_model(parser)
    add("--memory", action="store_true", default=argparse.SUPPRESS, help="count bytes held and moved; time nothing")
    add("--contexts", type=_numbers, metavar="N,...", help="tokens before those that are decoded (2000,8000)")
    add("--batch", type=int, metavar="N", help="rows (4)")
    add("--tokens", type=int, metavar="N", help="decoded in a round of a side (8)")
    add("--rounds", type=int, metavar="N", help="of each side (5)")
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 or auto (bfloat16)")
    add("--min-cache", type=float, metavar="X", help="times as fast the cache alone must be (1)")
    add("--min-both", type=float, metavar="X", help="times as fast cache and attention must be together (2)")
    add("--json", metavar="F", help="write the result to this file")


def _add_bench_driver(to: Any) -> None:
    about = "time each call of the driver, by page size"
    parser = _add(to, "driver", commands.bench_driver, about, _BENCH_DRIVER)
    add = parser.add_argument
    add(
        "--page-sizes",
        "--page-size",
        type=_words,
        default=["4KiB", "64KiB", "2MiB"],
        metavar="SIZE,...",
        help="(4KiB,64KiB,2MiB)",
    )
    add("--json", default=None, metavar="F", help="write the result to this file")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=None, metavar="MODEL", help=_MODEL)


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of the longest request (the model's)")
    parser.add_argument(
        "--kv-cache-memory", metavar="SIZE", help='physical memory for K and V, such as "2GiB" (half of what is left)'
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--n", type=int, metavar="N", help="answers to each prompt; needs a temperature (1)")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (all)")
    add("--top-p", type=float, metavar="P", help="sample from the fewest tokens that have this probability (1)")
    add("--min-p", type=float, metavar="P", help="drop tokens below this share of the most likely one's (0)")
    add("--repetition-penalty", type=float, metavar="X", help="above 1 against tokens that were there before (1)")
    add("--presence-penalty", type=float, metavar="X", help="-2 to 2, for each token in the answer (0)")
    add("--frequency-penalty", type=float, metavar="X", help="-2 to 2, for each time it is there (0)")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")
    add("--include-stop-str-in-output", action="store_true", help="end it after that text")
    add("--min-tokens", type=int, metavar="N", help="tokens to generate at least (0)")
    add("--ignore-eos", action="store_true", help="go on after the end of the answer")
    add(
        "--no-skip-special-tokens",
        dest="skip_special_tokens",
        action="store_false",
        help="show tokens such as <|im_end|> in the answer",
    )
    add("--logprobs", type=int, metavar="K", help="show each token's log-probability and those of the K most likely")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("layout").add_argument
    add("--head-major", action="store_true", help="a stream for each KV head")
    add("--layers-per-stream", type=_layers, metavar="N", help="layers that share a stream, or all (1)")
    add("--kv-together", action="store_true", help="K and V of a layer share a stream")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"write whole numbers separated by commas, not {text!r}") from None


def _chunks(text: str) -> list[int]:
    """Numbers, 0 for "whole"."""
    numbers = _numbers(",".join("0" if part.strip() == "whole" else part for part in text.split(",")))
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"a pass has at least one token, not {min(numbers)}")
    return numbers


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _layers(text: str) -> int | None:
    """A number, None for "all"."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'write a whole number or "all", not {text!r}') from None


_GENERATE = """\
The last line says what the KV cache had reserved, created, mapped and needed at its fullest.

examples:
  vattention generate
  vattention generate --prompt "Why is the sky blue?" --max-tokens 200
  vattention generate ./my-model --no-chat --prompt "Once upon a time" --temperature 0.8 --seed 7
  vattention generate --prompt "Name a colour." --n 3 --temperature 1 --top-p 0.9 --stop "."
  vattention generate --prompt-file question.txt --kv-cache-memory 256MiB --page-size 4KiB
"""

_INFO = """\
examples:
  vattention info
  vattention info --json
"""

_VERIFY = """\
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

_BENCH_MEMORY = """\
A trace is a CSV file with the columns num_prefill_tokens,num_decode_tokens or ContextTokens,GeneratedTokens. Without
one, lengths are drawn from exponential distributions of the given means. Pages are really created and mapped, for some
of the model's layers, as each has the same arithmetic; K and V are never written.
Exit code 1: mapped / needed is more than --max-ratio.

examples:
  vattention bench memory --trace conversation.csv --page-size 64KiB --json result.json --plot result.png
  vattention bench memory --requests 200 --prompt-tokens 500 --output-tokens 100 --memory 8GiB
  vattention bench memory --trace papers.csv --model-geometry yi-6b --page-size 2MiB --memory 40GiB
"""

_BENCH_GROWTH = """\
Rounds of both sides alternate in one process, on the same requests.
Exit code 1: the engine's thread made a driver call between two tokens, or decoding on demand took longer than
--max-overhead allows.

examples:
  vattention bench growth
  vattention bench growth --requests 4 --page-size 4KiB --rounds 9 --json growth.json
"""

_BENCH_GENERATE = """\
DynamicCache and VirtualCache, each with attn_implementation="sdpa" and "vattention", take turns in one process.
Exit code 1: a bar of speed (--min-cache, --min-both) or of memory is missed.

examples:
  vattention bench generate
  vattention bench generate --contexts 500,4000 --rounds 9 --json generate.json
  vattention bench generate --memory
"""

_BENCH_DRIVER = """\
examples:
  vattention bench driver
  vattention bench driver --page-sizes 64KiB,256KiB --json driver.json
"""

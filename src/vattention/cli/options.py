"""What several commands take, stated once: the parser's manners, a model, its engine, sampling.

Options are left out of the result unless they are given: defaults are stated by those who take them, and only repeated
in the help.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from vattention.cli.startup import without_collecting
from vattention.errors import ConfigError

if TYPE_CHECKING:
    from vattention.llm import LLM

USAGE = 2
FAILED = 1
MODEL = ("dtype", "device", "trust_remote_code")
CAPACITY = (
    "max_model_len",
    "kv_cache_memory",
    "memory_utilization",
    "page_size",
    "max_num_seqs",
    "max_num_batched_tokens",
)
FEATURES = ("cache", "block_size", "enable_prefix_caching", "compile", "cuda_graphs", "attention_kernel")
LAYOUT = ("head_major", "layers_per_stream", "kv_together")
CHOICE = (*LAYOUT, "expected_tokens")
CHECKS = ("guard", "poison")

_MODEL = "a directory, a .gguf file or a hub id; without it, the demo model (SmolLM2-135M-Instruct)"

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Bad usage in one line, and nothing for what is not given."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where to read more."""
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_command(to: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, more: str) -> Parser:
    """A command with its help: `about` in a line, and `more` after the options."""
    parser: Parser = to.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=more)
    parser.set_defaults(run=run)
    return parser


# -- a model and its engine -----------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, *, dtype: str = "auto") -> None:
    """Which model, and how to read it. `dtype` is the default, for the help."""
    add = parser.add_argument
    add("model", nargs="?", default=None, metavar="MODEL", help=_MODEL)
    add("--dtype", metavar="NAME", help=f"float32, bfloat16, float16 or auto ({dtype})")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:N, or auto (auto)")
    add("--trust-remote-code", action="store_true", help="run the configuration's and the tokenizer's own code, if any")


def add_capacity(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """How much the engine takes on, but for the options in `without`."""
    for name, kind, metavar, about in (
        ("max_model_len", int, "N", "tokens of the longest request (the model's)"),
        ("kv_cache_memory", str, "SIZE", 'physical memory for K and V, such as "2GiB" (half of what is left)'),
        ("memory_utilization", float, "SHARE", "of a GPU's memory to be in use when the cache is full (0.9)"),
        ("page_size", str, "SIZE", 'such as "64KiB" (the cache chooses)'),
        ("max_num_seqs", int, "N", "requests computed at once (16)"),
        ("max_num_batched_tokens", int, "N", "tokens in one forward pass (1024; of a GPU 2048)"),
    ):
        if name not in without:
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=about)


def add_features(parser: argparse.ArgumentParser) -> None:
    """What the engine can do besides, or will be able to: `LLM` refuses what is not built."""
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add("--cache", metavar="NAME", help="virtual, or paged, to compare with (virtual)")
    add("--block-size", type=int, metavar="N", help="tokens of a block with --cache paged (16)")
    add("--enable-prefix-caching", action=switch, help="keep the K and V of beginnings that requests share (not built)")
    add("--compile", action=switch, help="compile the model in the background (where much is generated)")
    add("--cuda-graphs", action=switch, help="replay decode passes from captured graphs; on a CPU once compiled (on)")
    add("--attention-kernel", metavar="NAME", help="flash, flex, flashinfer, ... instead of the fastest (auto)")


def add_layout(parser: argparse.ArgumentParser, *, chosen: bool = False) -> None:
    """How K and V lie in memory. `chosen`: what is not given is chosen for the model and the machine."""
    add = parser.add_argument_group("layout").add_argument
    switch = argparse.BooleanOptionalAction
    default = ("chosen",) * 3 if chosen else ("off", "1", "off")
    add("--head-major", action=switch, help=f"a stream for each KV head ({default[0]})")
    add("--layers-per-stream", type=layers, metavar="N", help=f"layers that share a stream, or all ({default[1]})")
    add("--kv-together", action=switch, help=f"K and V of a layer share a stream ({default[2]})")
    if chosen:
        add("--expected-tokens", type=int, metavar="N", help="of a typical request, to choose by (--max-model-len)")


def add_checks(parser: argparse.ArgumentParser) -> None:
    """The modes that find who reads memory that is not his."""
    add = parser.add_argument_group("checks").add_argument
    add("--guard", action="store_true", help="reading outside mapped memory crashes")
    add("--poison", action="store_true", help="NaN past the tokens before every pass (slow with large pages)")


def no_bars() -> None:
    """Progress bars off, those of transformers included. To be called before anything imports tqdm."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def open_llm(args: argparse.Namespace, **options: Any) -> LLM:
    """The model and engine that `args` describe; `options` of `LLM` where a command has its own mind.

    Raises: as `LLM`.
    """
    if args.model and " " in args.model and not os.path.exists(args.model):
        raise ConfigError(f"there is no model {args.model!r}: a prompt goes behind --prompt")
    asked = given(args, (*MODEL, *CAPACITY, *FEATURES, *CHOICE, *CHECKS))
    with without_collecting():
        from vattention.llm import LLM

        return LLM(args.model, **{**asked, **options})


# -- sampling -------------------------------------------------------------------------------------------------------

_SAMPLING: tuple[tuple[str, Callable[[str], Any], str, str], ...] = (
    ("max_tokens", int, "N", "tokens to generate at most"),
    ("temperature", float, "T", "0 takes the most likely token (0)"),
    ("top_k", int, "K", "sample from the K most likely tokens (all)"),
    ("top_p", float, "P", "sample from the fewest tokens that have this probability (1)"),
    ("min_p", float, "P", "drop tokens below this share of the most likely one's (0)"),
    ("repetition_penalty", float, "X", "above 1 against tokens that were there before (1)"),
    ("presence_penalty", float, "X", "-2 to 2, for each token in the answer (0)"),
    ("frequency_penalty", float, "X", "-2 to 2, for each time it is there (0)"),
    ("min_tokens", int, "N", "tokens to generate at least (0)"),
)


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """How tokens are chosen, and when an answer ends. `max_tokens` is the default, for the help."""
    add = parser.add_argument_group("sampling").add_argument
    for name, kind, metavar, about in _SAMPLING:
        more = f" ({max_tokens})" if name == "max_tokens" else ""
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=about + more)
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")
    add("--stop-token-ids", type=numbers, metavar="ID,...", help="end the answer at any of these tokens")
    add("--include-stop-str-in-output", action="store_true", help="end it after that text")
    add("--ignore-eos", action="store_true", help="go on after the end of the answer")
    add(
        "--no-skip-special-tokens",
        dest="skip_special_tokens",
        action="store_false",
        help="show tokens such as <|im_end|> in the answer",
    )


def add_structured(parser: argparse.ArgumentParser) -> None:
    """What form an answer must have."""
    group = parser.add_argument_group("structured output", "one of these; needs llguidance, see docs/server.md")
    add = group.add_mutually_exclusive_group().add_argument
    add("--json-schema", type=json_or_file, metavar="JSON|F", help="JSON of this schema, which may be in a file")
    add("--json-object", action="store_true", help="any JSON object")
    add("--regex", metavar="REGEX", help="a text that all of this regular expression matches")
    add("--choice", action="append", metavar="TEXT", help="one of these texts; may be repeated")


STRUCTURED = ("json_schema", "json_object", "regex", "choice")

SAMPLING = (
    *(name for name, *_ in _SAMPLING),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens"),
)


# -- values ---------------------------------------------------------------------------------------------------------


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options among `names` that were given; the others keep the defaults of whoever takes them."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def filled(options: Callable[..., T], args: argparse.Namespace, **more: Any) -> T:
    """The dataclass `options`, from `more` and the arguments of the same names."""
    names = tuple(field.name for field in dataclasses.fields(options))  # type: ignore[arg-type]
    return options(**{**given(args, names), **more})


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"write whole numbers separated by commas, not {text!r}") from None


def json_or_file(text: str) -> str:
    """JSON as it is, or what is in the file of that name."""
    if text.lstrip().startswith("{"):
        return text
    try:
        with open(text, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{text} is not UTF-8 text") from None


def words(text: str) -> list[str]:
    """Words separated by commas."""
    return [part.strip() for part in text.split(",")]


def layers(text: str) -> int | None:
    """A number, None for "all"."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'write a whole number or "all", not {text!r}') from None

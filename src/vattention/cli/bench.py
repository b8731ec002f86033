"""`vattention bench`: measurements."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from vattention.cli.options import (
    CAPACITY,
    CHOICE,
    FEATURES,
    LAYOUT,
    add_capacity,
    add_command,
    add_features,
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
    about = "measurements: throughput, latency, serve, coldstart, memory, growth, generate, driver, kernels, step"
    parser = commands.add_parser("bench", help=about, description="Measurements.")
    benches = parser.add_subparsers(required=True, metavar="WHAT")
    _add_throughput(benches)
    _add_latency(benches)
    _add_serve(benches)
    _add_coldstart(benches)
    _add_memory(benches)
    _add_growth(benches)
    _add_generate(benches)
    _add_driver(benches)
    _add_kernels(benches)
    _add_step(benches)


def _add_throughput(to: Any) -> None:
    about = "tokens per second, all requests at once, side by side with other engines"
    parser = add_command(to, "throughput", throughput, about, _THROUGHPUT)
    add = parser.add_argument
    _add_contest(parser)
    add("--requests", type=numbers, metavar="N,...", help="at once; a case each (8)")
    add("--prompt-tokens", type=numbers, metavar="N,...", help="of each request; a case each (512)")
    add("--output-tokens", type=int, metavar="N", help="of each request (64)")
    add("--trace", metavar="CSV", help="draw the lengths of --requests requests from this file instead")
    add("--longest", type=int, metavar="N", help="what the lengths of a trace are scaled to fit, in and out (2048)")
    add("--shared-prefix", type=int, metavar="N", help="tokens that all prompts of a run begin with (0)")
    add(
        "--at-least",
        type=_value,
        action="append",
        metavar="[PEER.]METRIC=X",
        help="fail where the ratio of prefill, decode or output is less; may be repeated",
    )
    add("--plot", metavar="F", help="draw the result into this file (.png, .svg, .pdf)")


def _add_latency(to: Any) -> None:
    about = "time to first token and per token of a single request, side by side with other engines"
    parser = add_command(to, "latency", latency, about, _LATENCY)
    add = parser.add_argument
    _add_contest(parser)
    add("--requests", type=int, metavar="N", help="one after the other, in each round (4)")
    add("--prompt-tokens", type=int, metavar="N", help="of each request (512)")
    add("--output-tokens", type=int, metavar="N", help="of each request (64)")


def _add_serve(to: Any) -> None:
    about = "load on servers that speak OpenAI's protocol, ours or not, one or several in turns"
    parser = add_command(to, "serve", serve, about, _SERVE)
    add = parser.add_argument
    _add_contest(parser)
    group = parser.add_argument_group("servers that run already").add_argument
    group("--url", metavar="URL", help="the one under load (without it, ours is started, and every --peer)")
    group("--side", type=_side, action="append", metavar="NAME=URL", help="one of several, in turns; may be repeated")
    group("--api-key", metavar="KEY", help="sent to all of them (VATTENTION_API_KEY of the environment)")
    group("--model-name", metavar="NAME", help="what requests ask for (the first that a server lists)")
    group = parser.add_argument_group("requests").add_argument
    group("--num-requests", type=int, metavar="N", help="of each round (24)")
    group("--prompt-tokens", type=int, metavar="N", help="of each request (256)")
    group("--output-tokens", type=int, metavar="N", help="of each request (64)")
    group("--trace", metavar="CSV", help="take the lengths of the first --num-requests requests of this file instead")
    group("--longest", type=int, metavar="N", help="what the lengths of a trace are scaled to fit, in and out (2048)")
    group("--endpoint", metavar="NAME", help="completions or chat (completions)")
    group("--prompts", metavar="KIND", help="ids, random token ids, or text (ids; of chat, text)")
    group("--vocab-size", type=int, metavar="N", help="random ids are below it (10000)")
    group(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="ask for exactly the tokens of output, which not every server can do (on)",
    )
    group("--body", type=_object, metavar="JSON", help='more fields of every request, such as {"top_p": 0.9}')
    group = parser.add_argument_group("arrivals").add_argument
    group("--concurrency", type=int, metavar="N", help="requests under way at most (8; of other arrivals, any number)")
    group("--rate", type=float, metavar="R", help="Poisson arrivals, R a second")
    group("--trace-arrivals", action="store_true", help="the times of the trace")
    group("--speed", type=float, metavar="X", help="times as fast as the trace (1)")
    group("--load", type=float, metavar="X", help="then Poisson arrivals at this share of what the first peer can do")
    add(
        "--must-win",
        action="store_true",
        help="fail unless ours is ahead in output, and in p50 and p99 of first tokens and tokens",
    )
    add("--overhead", action="store_true", help="our engine over HTTP against itself offline, everything at once")
    add(
        "--at-least", type=float, metavar="X", help="of --overhead: the share of the tokens a second that passes (0.95)"
    )
    add("--plot", metavar="F", help="draw the result into this file (.png, .svg, .pdf)")


def _add_coldstart(to: Any) -> None:
    about = "from starting a process to its first token, `vattention generate` beside transformers"
    parser = add_command(to, "coldstart", coldstart, about, _COLDSTART)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a directory or a .gguf file; without it, the demo model")
    add("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (bfloat16)")
    add("--prompt", metavar="TEXT", help="what to continue")
    add("--rounds", type=int, metavar="N", help="processes of each side (5)")
    add("--threads", type=int, metavar="N", help="of each side (a core each)")
    add("--max-ratio", type=float, metavar="X", help="fail where ours takes more than X times as long")
    add("--timeout", type=float, metavar="S", help="seconds for a process (300)")
    add("--json", metavar="F", help="write the result to this file")


def _add_contest(parser: argparse.ArgumentParser) -> None:
    """Who is measured, and what is the same for all of them."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a directory or a .gguf file; without it, the demo model")
    add("--dtype", metavar="NAME", help="of weights, K and V: float32, bfloat16 or float16 (bfloat16)")
    add(
        "--peer",
        type=_named,
        action="append",
        metavar="NAME[=FOLDER]",
        help="vllm, openvino, transformers, transformers-cb or llama.cpp, and the virtual environment that has it, or"
        " paged-16 or paged-256, our own engine with K and V in blocks; may be repeated",
    )
    add("--peer-model", type=_named, action="append", metavar="NAME=PATH", help="what it reads in place of MODEL")
    add(
        "--peer-option",
        type=_named,
        action="append",
        metavar="NAME.KEY=VALUE",
        help="an option of that engine, such as transformers.cache=static; may be repeated",
    )
    add("--rounds", type=int, metavar="N", help="of each side, in turns (3)")
    add("--threads", type=int, metavar="N", help="of each side (a core each)")
    add("--seed", type=int, metavar="N", help="of the prompts (0)")
    add("--preload", metavar="LIB", help="LD_PRELOAD of every side, such as the path of libtcmalloc")
    add("--wait-policy", metavar="NAME", help="OMP_WAIT_POLICY of every side, active or passive (as it is)")
    add("--timeout", type=float, metavar="S", help="seconds for any answer of a side, its start included (900)")
    add("--max-num-seqs", type=int, metavar="N", help="requests computed at once, on every side (64)")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens in a pass, on every side (each side's own)")
    add("--kv-cache-memory", metavar="SIZE", help="memory for K and V of every side (4GiB)")
    add("--json", metavar="F", help="write the result to this file")
    add_features(parser)
    ours = parser.add_argument_group("of our engine alone").add_argument
    ours("--page-size", metavar="SIZE", help='such as "64KiB" (the cache chooses)')
    add_layout(parser, chosen=True)


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


def _add_step(to: Any) -> None:
    about = "where the time of a pass goes on the CPU, beside what its bytes and its arithmetic need"
    parser = add_command(to, "step", step, about, _STEP)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a directory or a .gguf file; without it, the demo model")
    add("--dtype", metavar="NAME", help="of weights, K and V: float32, bfloat16 or float16 (bfloat16)")
    add("--requests", type=int, metavar="N", help="that decode together (8)")
    add("--prompt-tokens", type=int, metavar="N", help="of each request (512)")
    add("--passes", type=int, metavar="N", help="of decodes, timed (40)")
    add("--compile", action=argparse.BooleanOptionalAction, help="the model's layers, before (on)")
    add("--threads", type=int, metavar="N", help="(torch's own number)")
    add_layout(parser, chosen=True)
    add("--json", metavar="F", help="write the result to this file")
    add("--plot", metavar="F", help="draw the result into this file (.png, .svg, .pdf)")


def throughput(args: argparse.Namespace) -> int:
    """All requests at once, side by side."""
    from vattention.bench.throughput import ThroughputBench, run

    return run(filled(ThroughputBench, args, contest=_contest(args), at_least=_bars(args)))


def latency(args: argparse.Namespace) -> int:
    """One request at a time, side by side."""
    from vattention.bench.latency import LatencyBench, run

    return run(filled(LatencyBench, args, contest=_contest(args)))


def serve(args: argparse.Namespace) -> int:
    """Load on servers."""
    from vattention.bench.load.requests import Form
    from vattention.bench.serve import ServeBench, run

    asked = vars(args)
    asked.setdefault("prompts", "text" if asked.get("endpoint") == "chat" else "ids")
    asked.setdefault("api_key", os.environ.get("VATTENTION_API_KEY"))
    # How long a server may take to start, and a request to be answered, is one option here.
    options = filled(ServeBench, args, form=filled(Form, args), contest=_contest(args))
    if asked.get("overhead"):
        from vattention.bench.overhead import OverheadBench
        from vattention.bench.overhead import run as run_overhead

        return run_overhead(filled(OverheadBench, args, contest=options.contest))
    return run(options)


def coldstart(args: argparse.Namespace) -> int:
    """From starting a process to its first token."""
    from vattention.bench.coldstart import ColdstartBench, run

    return run(filled(ColdstartBench, args))


def _contest(args: argparse.Namespace) -> Any:
    """The sides that `args` describe."""
    from vattention.bench.contest import ContestOptions

    models = dict(getattr(args, "peer_model", ()))
    options: dict[str, dict[str, Any]] = {}
    for name, value in getattr(args, "peer_option", ()):
        peer, _, key = name.rpartition(".")  # llama.cpp has a dot, keys have none
        if not peer or value is None:
            raise ConfigError(f"--peer-option {name}: write NAME.KEY=VALUE")
        options.setdefault(peer, {})[key] = _literal(value)
    if None in models.values():
        raise ConfigError("--peer-model: write NAME=PATH")
    ours = given(args, ("page_size", *(name for name in FEATURES if name != "enable_prefix_caching"), *CHOICE))
    return filled(
        ContestOptions,
        args,
        peers=dict(getattr(args, "peer", ())),
        peer_models=models,
        peer_options=options,
        ours=ours,
    )


def _bars(args: argparse.Namespace) -> dict[str, float]:
    return dict(getattr(args, "at_least", ()))


def _named(text: str) -> tuple[str, str | None]:
    """NAME or NAME=VALUE."""
    name, sign, value = text.partition("=")
    return name, value if sign else None


def _value(text: str) -> tuple[str, float]:
    """NAME=X."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"write a name, = and a number, not {text!r}") from None


def _side(text: str) -> tuple[str, str]:
    """NAME=URL."""
    name, sign, url = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"write a name, = and a URL, not {text!r}")
    return name, url


def _object(text: str) -> dict[str, Any]:
    """A JSON object."""
    found = _literal(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"write a JSON object, not {text!r}")
    return found


def _literal(text: str) -> Any:
    """A number, true, false, null or anything else that JSON knows; otherwise the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


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


def step(args: argparse.Namespace) -> int:
    """Time the parts of a pass."""
    from vattention.bench.step import StepBench, measure

    return measure(filled(StepBench, args), layout=given(args, CHOICE))


_THROUGHPUT = """\
Every side is a process of its own, loads the model once, does each case once to warm up, and then works in turns with
the others; a side that is not at work is stopped. A round of a case is two runs: one token of output from each prompt
(prefill), and the whole; decoding is the difference. A ratio is the median of the ratios within each round, and more
than 1 means that ours is faster. METRIC is prefill, decode or output.
Exit code 1: the conditions of the sides differ, or a ratio is less than --at-least.

examples:
  vattention bench throughput --requests 1,8 --prompt-tokens 512,2048
  vattention bench throughput --peer vllm=envs/vllm --at-least decode=2.0 --at-least prefill=1.8
  vattention bench throughput --peer openvino=envs/openvino --peer-model openvino=exported --json result.json
  vattention bench throughput --trace conversation.csv --requests 64 --longest 2048 --peer vllm=envs/vllm
  vattention bench throughput --peer transformers --peer-option transformers.cache=static --plot result.png
"""

_LATENCY = """\
The sides are those of `vattention bench throughput`, with the same checks.
Exit code 1: the conditions of the sides differ.

examples:
  vattention bench latency
  vattention bench latency --peer transformers --peer-option transformers.cache=static --peer vllm=envs/vllm
"""

_SERVE = """\
Servers that are started here get equal threads, and take turns as the sides of `vattention bench throughput` do: one
that is not at work is stopped. In each round all sides get the same requests at the same times. Times are seen by the
client: until the first text, and from there on the mean time of a token. All requests are streamed, greedy, and go on
past the end of the text.
Exit code 1: a request failed, --must-win and ours is not ahead, or --overhead and the share is below --at-least.

examples:
  vattention bench serve --compile --concurrency 16
  vattention bench serve --url http://127.0.0.1:8000 --rate 2 --num-requests 100 --endpoint chat
  vattention bench serve --url http://127.0.0.1:8000 --trace conversation.csv --trace-arrivals --speed 4
  vattention bench serve --side a=http://127.0.0.1:8000 --side b=http://127.0.0.1:8001 --rounds 5
  vattention bench serve --peer vllm=envs/vllm --compile --head-major --load 0.7 --must-win
  vattention bench serve --overhead --compile --head-major --num-requests 32 --max-num-seqs 16
"""

_COLDSTART = """\
Fresh processes of both sides in turns; the first of each is not counted, as it brings files into memory.
Exit code 1: ours takes more than --max-ratio as long.

examples:
  vattention bench coldstart --max-ratio 1.1
"""

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

_STEP = """\
examples:
  vattention bench step
  vattention bench step models/llama --prompt-tokens 2048 --plot step.png
"""

_KERNELS = """\
Every kernel computes all layers of a real cache, in rounds that alternate; the limit is measured in the same rounds.

examples:
  vattention bench kernels
  vattention bench kernels --heads 9/3x64 --lengths 2000 --dtypes bfloat16 --rounds 15 --json kernels.json
"""

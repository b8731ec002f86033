"""What each command does with its arguments. Each returns the exit code, and raises a VAttentionError for code 2."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vattention.errors import ConfigError

if TYPE_CHECKING:
    from vattention.engine.outputs import CompletionOutput

_DEMO_PROMPT = "What is the capital of France?"
_LAYOUT = ("head_major", "layers_per_stream", "kv_together")
_CAPACITY = ("max_model_len", "max_num_seqs", "kv_cache_memory", "page_size", "max_num_batched_tokens")

_SAMPLING = (
    *("n", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("stop", "min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "logprobs"),
)

T = TypeVar("T")


def generate(args: argparse.Namespace) -> int:
    """Continue prompts; the last line says what the KV cache took at its fullest."""
    if args.model and " " in args.model and not os.path.exists(args.model):
        raise ConfigError(f"there is no model {args.model!r}: a prompt goes behind --prompt")
    prompts = [*(args.prompt or ()), *(_read_prompt(path) for path in args.prompt_file or ())] or [_DEMO_PROMPT]

    from vattention.engine.loading import load_model
    from vattention.engine.sampling_params import SamplingParams
    from vattention.llm import LLM
    from vattention.memory.sizes import format_size

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, **_given(args, _SAMPLING))
    flags = _given(args, (*_CAPACITY, *_LAYOUT))
    loaded = load_model(args.model, dtype=args.dtype, max_model_len=flags.get("max_model_len"))
    with LLM(loaded, seed=args.seed, **flags) as llm:
        given = [_as_chat(llm.tokenizer, prompt, args.chat) for prompt in prompts]
        fullest = llm.stats()

        def look(*_: object) -> None:
            nonlocal fullest
            fullest = max(llm.stats(), fullest, key=lambda stats: stats.needed)

        # Afterwards every slot is free and nothing is needed. Before each forward pass the slots have what it needs.
        hook = loaded.model.register_forward_pre_hook(look)
        try:
            outputs = llm.generate(given, params, use_tqdm=sys.stderr.isatty())
        finally:
            hook.remove()
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"Prompt: {prompt}")
        for answer in output.outputs:
            _show(answer, len(output.prompt_token_ids), numbered=len(output.outputs) > 1)
        print()
    print(
        f"KV cache at its fullest: {format_size(fullest.reserved)} reserved, {format_size(fullest.created)} created,"
        f" {format_size(fullest.mapped)} mapped, {format_size(fullest.needed)} needed"
    )
    return 0


def _show(answer: CompletionOutput, tokens_in: int, *, numbered: bool) -> None:
    """One sample, and a line about it; a line a token where log-probabilities were asked for."""
    print(f"Answer{f' {answer.index + 1}' if numbered else ''}: {answer.text.strip()}")
    counts = f"{tokens_in} tokens in, {len(answer.token_ids)} out: {answer.finish_reason}"
    stop = "" if answer.stop_reason is None else f" at {answer.stop_reason!r}"
    total = "" if answer.cumulative_logprob is None else f", log-probability {answer.cumulative_logprob:.3f}"
    print(f"({counts}{stop}{total})")
    for entry in answer.logprobs or ():
        parts = (f"{said.decoded_token!r} {said.logprob:.3f} (rank {said.rank})" for said in entry.values())
        print("  " + ", ".join(parts))


def _as_chat(tokenizer: Any, prompt: str, chat: bool | None) -> Any:
    """A prompt for `LLM.generate`: in the model's chat template, if it has one and `chat` is not False.

    Raises:
        ConfigError: `chat` is True and the model has none.
    """
    from vattention.engine.chat import chat_text

    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise ConfigError("this model has no chat template: leave --chat out")
    if chat is False or not template:
        return prompt
    text = chat_text(tokenizer, [{"role": "user", "content": prompt}])
    # The template has written its own special tokens.
    return {"prompt_token_ids": tokenizer(text, add_special_tokens=False, verbose=False).input_ids}


def info(args: argparse.Namespace) -> int:
    """Show what this machine allows."""
    from vattention.bench.info import show

    return show(as_json=args.json)


def verify(args: argparse.Namespace) -> int:
    """Compare with transformers' own generate."""
    from vattention.bench.setup import EngineOptions
    from vattention.bench.verify import LAYOUTS, WHOLE, Verify, run

    grid = {
        "chunks": [64, WHOLE],
        "max_num_seqs": [1, 16],
        "layouts": ["all"],
        "page_sizes": ["4KiB", "64KiB", "2MiB"],
    }
    lists = {**(grid if args.sweep else {}), **_given(args, tuple(grid))}
    if lists.get("layouts") == ["all"]:
        lists["layouts"] = list(LAYOUTS)
    if unknown := set(lists.get("layouts", ())) - set(LAYOUTS):
        raise ConfigError(f"--layouts {','.join(sorted(unknown))}: known are {', '.join(LAYOUTS)}, or all")
    if "layouts" in lists and _given(args, _LAYOUT):
        raise ConfigError("--layouts and --sweep name whole layouts: leave the flags of a single one out")
    engine = EngineOptions(**_given(args, ("max_model_len", "kv_cache_memory", *_LAYOUT, "guard", "poison")))
    return run(_filled(Verify, args, engine=engine, **lists))


def bench_memory(args: argparse.Namespace) -> int:
    """Replay request lengths through a real cache."""
    from vattention.bench.geometry import GEOMETRIES
    from vattention.bench.memory import MemoryBench, run

    if args.model_geometry not in GEOMETRIES:
        raise ConfigError(f"--model-geometry {args.model_geometry}: known are {', '.join(GEOMETRIES)}")
    return run(_filled(MemoryBench, args))


def bench_growth(args: argparse.Namespace) -> int:
    """Decode with pages mapped on demand, against pages mapped before."""
    from vattention.bench.growth import GrowthBench, run
    from vattention.bench.setup import EngineOptions

    return run(_filled(GrowthBench, args, engine=EngineOptions(**_given(args, (*_CAPACITY, *_LAYOUT)))))


def bench_generate(args: argparse.Namespace) -> int:
    """Decode under transformers' generate(), by cache and by attention function."""
    from vattention.bench.generate import GenerateBench, run

    return run(_filled(GenerateBench, args))


def bench_driver(args: argparse.Namespace) -> int:
    """Time each call of the driver."""
    from vattention.bench.driver import report
    from vattention.memory.sizes import parse_size

    report([parse_size(size, "page_size") for size in args.page_sizes], json=args.json, command=args.command)
    return 0


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options among `names` that were given; the others keep the defaults of whoever takes them."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _filled(options: Callable[..., T], args: argparse.Namespace, **more: Any) -> T:
    """The dataclass `options`, from `more` and the arguments of the same names."""
    names = tuple(field.name for field in dataclasses.fields(options))  # type: ignore[arg-type]
    return options(**{**_given(args, names), **more})


def _read_prompt(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from None

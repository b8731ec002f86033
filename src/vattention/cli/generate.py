"""`vattention generate`: prompts in, answers out; for people, or as JSON lines."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vattention.cli import batch
from vattention.cli.figures import Fullest
from vattention.cli.options import (
    SAMPLING,
    STRUCTURED,
    add_capacity,
    add_checks,
    add_command,
    add_features,
    add_layout,
    add_model,
    add_sampling,
    add_structured,
    given,
    no_bars,
    open_llm,
)
from vattention.cli.prompts import chat_ids, has_template, sampling_params
from vattention.errors import ConfigError

if TYPE_CHECKING:
    from vattention.engine.outputs import CompletionOutput

_DEMO_PROMPT = "What is the capital of France?"
_MAX_TOKENS = 128


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "generate", run, "continue prompts, and show what the KV cache took", _MORE)
    add = parser.add_argument
    add_model(parser)
    add("--prompt", action="append", default=None, metavar="TEXT", help="what to continue; may be repeated")
    add(
        "--prompt-file",
        action="append",
        default=None,
        metavar="F",
        help="a file whose whole text is a prompt, - for standard input; may be repeated",
    )
    add("--input", default=None, metavar="F", help="JSON lines, a request each, - for standard input")
    add("--output", default=None, metavar="F", help="write JSON lines to this file (standard output, after --input)")
    add("--resume", action="store_true", default=False, help="leave out what --output has already, and add the rest")
    add("--quiet", action="store_true", default=False, help="no progress bar, and nothing about memory at the end")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put prompts into the model's chat template (if it has one; those of --input are left as they are)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    add_capacity(parser)
    add_features(parser)
    add_sampling(parser, max_tokens=_MAX_TOKENS)
    add("--n", type=int, metavar="N", help="answers to each prompt; needs a temperature (1)")
    add("--logprobs", type=int, metavar="K", help="show each token's log-probability and those of the K most likely")
    add("--prompt-logprobs", type=int, metavar="K", help="the same for the tokens of the prompt; JSON lines only")
    add_structured(parser)
    add_layout(parser, chosen=True)
    add_checks(parser)


def run(args: argparse.Namespace) -> int:
    """Continue prompts; the last line says what the KV cache took at its fullest."""
    prompts = _prompts(args)
    if args.quiet:
        no_bars()
    named = given(args, (*SAMPLING, "n", "logprobs", "prompt_logprobs"))
    sampling = {"temperature": 0.0, "max_tokens": _MAX_TOKENS, **named}
    if form := given(args, STRUCTURED):
        sampling["structured"] = form
    params = sampling_params(sampling)
    if args.input is not None or args.output is not None:
        items = batch.of_prompts(prompts) if args.input is None else None
        chat = args.chat if args.input is None else bool(args.chat)
        return batch.run(args, items, sampling, chat)
    if args.resume:
        raise ConfigError("--resume goes on with a file: name it with --output")
    if params.prompt_logprobs is not None:
        raise ConfigError("--prompt-logprobs are shown in JSON lines only: add --output FILE")
    with open_llm(args, seed=args.seed) as llm:
        chat = _wanted(llm.tokenizer, args.chat)
        requests = [
            {"prompt_token_ids": chat_ids(llm.tokenizer, [{"role": "user", "content": text}])} if chat else text
            for text in prompts
        ]
        with Fullest(llm) as fullest:
            outputs = llm.generate(requests, params, use_tqdm=sys.stderr.isatty() and not args.quiet)
    for text, output in zip(prompts, outputs, strict=True):
        print(f"Prompt: {text}")
        for answer in output.outputs:
            _show(answer, len(output.prompt_token_ids), numbered=len(output.outputs) > 1)
        print()
    if not args.quiet:
        print(f"KV cache at its fullest: {fullest}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.input is not None and (args.prompt or args.prompt_file):
        raise ConfigError("--input has the prompts: leave --prompt and --prompt-file out")
    if (args.prompt_file or []).count("-") > 1:
        raise ConfigError("--prompt-file - : standard input can be read once")
    return [*(args.prompt or ()), *(_read(path) for path in args.prompt_file or ())] or [_DEMO_PROMPT]


def _wanted(tokenizer: Any, chat: bool | None) -> bool:
    """Whether prompts go into the chat template. Raises ConfigError where it is asked for and there is none."""
    if chat and not has_template(tokenizer):
        raise ConfigError("this model has no chat template: leave --chat out")
    return has_template(tokenizer) if chat is None else chat


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


def _read(path: str) -> str:
    try:
        if path == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                content = file.read()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"cannot read {path}: line {line} is not UTF-8 text ({error.reason})") from None


_MORE = """\
The last line says what the KV cache had reserved, created, mapped and needed at its fullest.

A line of --input is an object with one of "prompt", "prompt_token_ids" and "messages", an "id" or "custom_id" if you
like, and sampling parameters by their names, which go before the options here. A line of the output has the same id,
and "outputs" or an "error". Exit code 1: some lines have an error.

examples:
  vattention generate
  vattention generate --prompt "Why is the sky blue?" --max-tokens 200
  vattention generate ./my-model --no-chat --prompt "Once upon a time" --temperature 0.8 --seed 7
  vattention generate --prompt "Name a colour." --n 3 --temperature 1 --top-p 0.9 --stop "."
  vattention generate --prompt-file question.txt --kv-cache-memory 256MiB --page-size 4KiB
  vattention generate --input questions.jsonl --output answers.jsonl --resume
  vattention generate --prompt "Is the sky blue?" --choice yes --choice no
"""

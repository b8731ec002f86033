"""Options, and the documentation of them."""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from vattention import SamplingParams
from vattention.cli.arguments import parser
from vattention.engine.opening import LLMOptions

DOCS = Path(__file__).parents[2] / "docs" / "commands.md"


def commands(of: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every command that can be run."""
    nested = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield of
    for action in nested:
        for each in action.choices.values():
            yield from commands(each)


def command(name: str) -> argparse.ArgumentParser:
    return next(each for each in commands(parser()) if each.prog == f"vattention {name}")


def names(of: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in of._actions}


def test_every_option_of_llm_is_one_of_the_commands_that_open_one() -> None:
    options = set(LLMOptions.__annotations__) | {"model"}
    assert options <= names(command("generate"))
    assert options - {"max_num_seqs"} <= names(command("chat"))  # a conversation is one request


def test_every_sampling_parameter_is_an_option_or_of_json_lines_or_programs_alone() -> None:
    parameters = {each.name for each in fields(SamplingParams)}
    assert parameters - names(command("generate")) == {"logit_bias", "detokenize", "output_kind", "structured"}


@pytest.mark.parametrize("name", ["generate", "chat", "verify", "bench growth"])
def test_a_model_is_named_the_same_way_everywhere(name: str) -> None:
    shared = {"model", "dtype", "device", "trust_remote_code", "max_model_len", "kv_cache_memory"}
    assert shared <= names(command(name))


def examples() -> list[str]:
    """Every command line in the documentation and in the help texts."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
    texts = [*blocks, *(each.epilog or "" for each in commands(parser()))]
    lines = [line.partition("  #")[0].strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if re.search(r"(^|\| )vattention ", line)]


def test_there_are_examples_of_every_command() -> None:
    used = {each.prog for each in commands(parser()) for line in examples() if each.prog in line}
    assert used == {each.prog for each in commands(parser())}


@pytest.mark.parametrize("line", examples())
def test_examples_can_be_typed(line: str) -> None:
    words = shlex.split(line[line.index("vattention ") :])
    for sign in ("|", ">", "<"):
        words = words[: words.index(sign)] if sign in words else words
    parser().parse_args(words[1:])


def test_options_that_the_documentation_names_exist() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOCS.read_text())) - {"--help"}
    assert named <= {option for each in commands(parser()) for option in each._option_string_actions}

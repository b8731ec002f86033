"""The options of a command from elsewhere: the environment, and a file. What the command line says goes before both."""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vattention.errors import ConfigError

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Sources:
    """Where else options are looked for, and which were found there.

    Args:
        parser: whose options; each is known by its long name, without dashes in front.
        prefix: of the variables: VATTENTION_SERVE_MAX_MODEL_LEN is --max-model-len.
        special: variables that have names of their own, by option. They may have several values, with commas.
    """

    parser: argparse.ArgumentParser
    prefix: str
    special: Mapping[str, str] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)

    def fill(self, args: argparse.Namespace, environ: Mapping[str, str]) -> None:
        """Add to `args` what it has not, from the environment, then from the file that `config` names.

        Raises:
            ConfigError: a value that cannot be, or an option that there is not. The message names the source.
        """
        for name, action in self._actions().items():
            variable = self.special.get(name, self.prefix + name.upper())
            if variable in environ and not _has(args, action):
                self._set(args, action, _from_text(action, environ[variable], variable), variable)
        self._warn_of_unknown(environ)
        if hasattr(args, "config"):
            self._fill_from_file(args, args.config)

    def blame(self, message: str) -> str:
        """`message`, and where the options that it speaks of have come from, unless that is the command line."""
        words = set(re.findall(r"\w+", message.replace("-", "_")))
        spoken = [name for name in self.found if name in words]
        return message + "".join(f" ({name} comes from {self.found[name]})" for name in spoken)

    def _actions(self) -> dict[str, argparse.Action]:
        return {_name(each): each for each in self.parser._actions if each.dest != "help"}

    def _set(self, args: argparse.Namespace, action: argparse.Action, value: Any, source: str) -> None:
        setattr(args, action.dest, value)
        self.found[action.dest] = source

    def _fill_from_file(self, args: argparse.Namespace, path: str) -> None:
        try:
            with open(path, "rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from None
        actions = self._actions()
        del actions["config"]
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in actions:
                near = difflib.get_close_matches(name, actions, n=1)
                raise ConfigError(f"{path}: there is no option {key!r}" + (f": {near[0]}?" if near else ""))
            read = _from_value(actions[name], value, f"{path}: {key}")  # also where another source goes before it
            if not _has(args, actions[name]):
                self._set(args, actions[name], read, path)

    def _warn_of_unknown(self, environ: Mapping[str, str]) -> None:
        known = {self.prefix + name.upper() for name in self._actions() if name not in self.special}
        for variable in sorted(environ):
            if variable.startswith(self.prefix) and variable not in known:
                warnings.warn(f"the environment has {variable}, which is no option", stacklevel=2)


def _name(action: argparse.Action) -> str:
    return action.option_strings[0].lstrip("-").replace("-", "_") if action.option_strings else action.dest


def _has(args: argparse.Namespace, action: argparse.Action) -> bool:
    """Whether it is given. An argument without dashes is always there, as None."""
    return hasattr(args, action.dest) and (bool(action.option_strings) or getattr(args, action.dest) is not None)


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0


def _is_list(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction)


def _from_text(action: argparse.Action, text: str, source: str) -> Any:
    """The value that a variable's text means."""
    if _is_switch(action):
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ConfigError(f"{source} must be on or off")
        return text.lower() in _TRUE
    if _is_list(action):
        values = [_typed(action, part.strip(), source) for part in text.split(",") if part.strip()]
        if not values:  # else an empty variable would switch off the keys of a server
            raise ConfigError(f"{source} is set, and empty: give it a value, or unset it")
        return values
    return _typed(action, text, source)


def _from_value(action: argparse.Action, value: Any, source: str) -> Any:
    """The value that one of TOML means."""
    if _is_switch(action):
        if not isinstance(value, bool):
            raise ConfigError(f"{source} must be true or false")
        return value
    if _is_list(action):
        values: Sequence[Any] = value if isinstance(value, list) else [value]
        if not values:
            raise ConfigError(f"{source} is empty: give it a value, or leave it out")
        return [_from_scalar(action, each, source) for each in values]
    return _from_scalar(action, value, source)


def _from_scalar(action: argparse.Action, value: Any, source: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{source} must be text or a number, not {type(value).__name__}")
    return _typed(action, str(value), source)


def _typed(action: argparse.Action, text: str, source: str) -> Any:
    """Through the option's own type. What the value is, is not said: it may be a key."""
    if not text:
        raise ConfigError(f"{source} is set, and empty: give it a value, or unset it")
    try:
        value = action.type(text) if callable(action.type) else text
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{source}: {error}") from None
    except ValueError:
        raise ConfigError(f"{source} must be {_KINDS.get(action.type, 'something else')}, not {text!r}") from None
    if action.choices is not None and value not in action.choices:
        raise ConfigError(f"{source} must be one of {', '.join(map(str, action.choices))}, not {text!r}")
    return value


_KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}

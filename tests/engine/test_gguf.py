"""GGUF files: read once, the same as transformers reads them, and refused in one line when they are damaged."""

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from support.models import tiny_model
from vattention.engine.gguf import _SURE, check_rope, read_gguf, read_once
from vattention.engine.loading import find, load_model
from vattention.errors import ConfigError, UnsupportedModel

KINDS = (Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0, Kind.Q5_1)
SLOW_WAY = "gpt2"
"""An architecture that goes transformers' way: its tensors are transposed."""


def write(path: Path, architecture: str, tied: bool = False, rope: Any = None, scaling: str | None = None) -> Path:
    """A small GGUF file of random tensors of every kind, under the names that gguf has for them.

    `rope` are RoPE factors, and `scaling` a kind of scaling, for those that have any.
    """
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    # What the files of these do not say is what transformers takes for granted.
    sizes |= {"qwen3": {"head_dim": 128}, SLOW_WAY: {"max_position_embeddings": 1024}}.get(architecture, {})
    model = tiny_model(model_type, **sizes)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.name", "small")
    for key, name in GGUF_CONFIG_MAPPING[architecture].items():
        value = getattr(model.config, name, None) if name else None
        if isinstance(value, (int, float)):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(model.config.vocab_size)])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    writer.add_uint32("tokenizer.ggml.padding_token_id", 0)
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope, dtype=np.float32))
    if scaling is not None:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    generator = np.random.default_rng(0)
    for index, (name, weight) in enumerate(model.state_dict().items()):
        stem, _, suffix = name.rpartition(".")
        if tied and stem == "lm_head":
            continue
        known = table.get_name(stem)
        assert known is not None, name
        numbers = generator.standard_normal(tuple(weight.shape), dtype=np.float32)
        if architecture == SLOW_WAY and numbers.ndim == 2 and ".h." in name:
            numbers = numbers.T.copy()
        kind = KINDS[index % len(KINDS)] if numbers.ndim == 2 and numbers.shape[1] % 32 == 0 else Kind.F32
        writer.add_tensor(f"{known}.{suffix}", gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_transformers(path: Path, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(**where)
    return config.to_dict(), AutoModelForCausalLM.from_pretrained(**where, config=config, **options).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", [*sorted(_SURE), SLOW_WAY])
def test_the_same_as_transformers_reads(architecture: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    if architecture == "gemma2" and not tied:
        pytest.skip("there are no such files: gguf has no name for an output of its own")
    path = write(tmp_path / "small.gguf", architecture, tied)
    config, weights = by_transformers(path, dtype=dtype)
    with read_once(read_gguf(path)):
        ours, read = by_transformers(path, dtype=dtype)
    assert ours == config
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(read[name], weight), name
        assert read[name].dtype == dtype


@pytest.mark.parametrize("architecture", ["llama", SLOW_WAY])
def test_nothing_is_printed_and_nothing_read_twice(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "small.gguf", architecture)
    reads = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *args: reads.append(args) or reader(*args))
    capfd.readouterr()
    with read_once(read_gguf(path)):
        by_transformers(path)
    assert bool(reads) == (architecture == SLOW_WAY)
    assert "de-quantizing" not in "".join(capfd.readouterr())
    by_transformers(path)
    assert reads, "afterwards transformers has its own reader back"
    assert "de-quantizing" in capfd.readouterr().err


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_of_llama_3_are_not_lost(factor: float, tmp_path: Path) -> None:
    """transformers alone would leave the tensor out, and compute another model without a word."""
    wanted = tiny_model("llama", head_dim=16, num_attention_heads=4).config
    wanted.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](wanted, "cpu")
    plain = 10000.0 ** -(torch.arange(8) / 8)
    path = write(tmp_path / "small.gguf", "llama", rope=plain / scaled)
    file = read_gguf(path)
    check_rope(file)
    with read_once(file):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert not torch.allclose(plain, scaled)
    assert torch.allclose(model.model.rotary_emb.inv_freq, scaled, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"rope": [1.0] * 7 + [3.0]}, "RoPE factors that are not those of Llama 3"), ({"scaling": "yarn"}, r"\(yarn\)")],
)
def test_rope_that_would_be_lost_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        load_model(write(tmp_path / "small.gguf", "llama", **options))


@pytest.mark.slow
def test_the_demo_file_is_read_as_transformers_reads_it() -> None:
    path = Path(str(find(None)))
    config, weights = by_transformers(path, dtype=torch.float32)
    with read_once(read_gguf(path)):
        ours, read = by_transformers(path, dtype=torch.float32)
    assert ours == config
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())


DAMAGE: dict[str, tuple[Any, str]] = {
    "empty": (lambda whole: b"", "is empty"),
    "another file": (lambda whole: b"PK\3\4" + whole, "is no GGUF file"),
    "a git-lfs pointer": (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "four bytes": (lambda whole: whole[:4], "header goes beyond"),
    "half a header": (lambda whole: whole[:3000], "header goes beyond"),
    "the last bytes missing": (lambda whole: whole[:-40], "cut short.*finish the download"),
    "half the tensors": (lambda whole: whole[: len(whole) // 2], "cut short.*finish the download"),
    "another version": (lambda whole: whole[:4] + struct.pack("<I", 9) + whole[8:], "version 9"),
    "countless keys": (lambda whole: whole[:16] + struct.pack("<Q", 2**60) + whole[24:], "damaged"),
    "countless tensors": (lambda whole: whole[:8] + struct.pack("<Q", 2**60) + whole[16:], "damaged"),
    "an endless key": (lambda whole: whole[:24] + struct.pack("<Q", 2**63) + whole[32:], "header goes beyond"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    spoil, message = DAMAGE[damage]
    path = write(tmp_path / "small.gguf", "llama")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"small\.gguf.*{message}") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_whatever_is_in_the_header_is_one_error(tmp_path: Path) -> None:
    """Bytes of the header at random: it still reads, or is refused; nothing crashes, hangs or takes all memory."""
    path = write(tmp_path / "small.gguf", "llama")
    whole = path.read_bytes()
    header = read_gguf(path).tensors[0].offset
    chance, refused = random.Random(0), 0
    for _ in range(150):
        spoiled = bytearray(whole)
        for _ in range(chance.choice([1, 1, 4])):
            spoiled[chance.randrange(header)] = chance.choice([0, 1, 255, chance.randrange(256)])
        path.write_bytes(spoiled)
        try:
            read_gguf(path)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "small.gguf", "llama")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gguf: pip install"):
        load_model(path)

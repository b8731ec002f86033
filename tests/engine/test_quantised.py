"""Quantised checkpoints: those that run here give what transformers makes of them; the others are refused by name."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.models import TOLERANCE, prompts_of, teacher_forced, tiny_config, tiny_model
from vattention import LLM, SamplingParams
from vattention.engine import weights
from vattention.engine.judge import judge
from vattention.engine.loading import load_model
from vattention.errors import ConfigError, UnsupportedModel

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
BLOCK = 64
ROUNDED = {"bitsandbytes": 1e-2}
"""Methods that round inside, as bfloat16 does: there, a difference of float32 rounding now and then becomes a larger
one. As in bfloat16, the tolerance is that of such a step."""


def save(directory: Path, model_type: str = "llama") -> dict[str, torch.Tensor]:
    tiny_model(model_type, **SIZES).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def finish(directory: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def fp8(directory: Path) -> None:
    """Blocks of 64 x 64 with a scale each, as DeepSeek-V3 and the FP8 Qwen3 are published."""
    tensors = save(directory)
    for name, weight in list(tensors.items()):
        if "proj" in name:
            rows, columns = (size // BLOCK for size in weight.shape)
            blocks = weight.view(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    finish(
        directory,
        tensors,
        {
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head"],
        },
    )


def mxfp4(directory: Path) -> None:
    """Random experts in blocks of 32 four-bit numbers with an exponent each, as GPT-OSS is published."""
    tensors = save(directory, "gpt_oss")
    generator = torch.Generator().manual_seed(0)
    for name, weight in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = weight.shape  # stored transposed
            del tensors[name]
            shape = (experts, rows, columns // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(120, 124, shape[:3], generator=generator, dtype=torch.uint8)
    finish(directory, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def compressed_tensors(directory: Path) -> None:
    """Eight-bit weights with a scale a row."""
    tensors = save(directory)
    for name, weight in list(tensors.items()):
        if "proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    finish(
        directory,
        tensors,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "format": "int-quantized"}},
            "ignore": ["lm_head"],
        },
    )


def by_transformers(settings: Callable[[], Any]) -> Callable[[Path], None]:
    def quantise(directory: Path) -> None:
        save(directory / "full")
        quantised = AutoModelForCausalLM.from_pretrained(directory / "full", quantization_config=settings())
        quantised.save_pretrained(directory)

    return quantise


def torchao_settings() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_settings() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


METHODS: dict[str, tuple[Callable[[Path], None], str]] = {
    "fp8": (fp8, "accelerate"),
    "mxfp4": (mxfp4, "accelerate"),
    "compressed-tensors": (compressed_tensors, "compressed_tensors"),
    "torchao": (by_transformers(torchao_settings), "torchao"),
    "bitsandbytes": (by_transformers(bitsandbytes_settings), "bitsandbytes"),
}


@pytest.fixture(params=METHODS)
def quantised(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    make, package = METHODS[request.param]
    pytest.importorskip(package)
    make(tmp_path)
    return request.param, tmp_path


def test_what_transformers_makes_of_it(quantised: tuple[str, Path]) -> None:
    method, directory = quantised
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = prompts_of(3, 40, 25)
    with LLM(directory, dtype="float32", kv_cache_memory="8MiB", max_num_batched_tokens=16, poison=True) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2),
            use_tqdm=False,
        )
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        logits = teacher_forced(reference, prompt, tokens)
        tolerance = ROUNDED.get(method, TOLERANCE) * float(logits.std())
        lead = logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float(lead.max()) < tolerance
        for row, ours in zip(logits.log_softmax(-1), output.outputs[0].logprobs or (), strict=True):
            assert all(abs(float(row[token]) - said.logprob) < tolerance for token, said in ours.items())


def test_fp8_is_the_numbers_times_their_scales(tmp_path: Path) -> None:
    """Not only what transformers says: the arithmetic of the format."""
    pytest.importorskip("accelerate")
    fp8(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    scale = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    loaded = load_model(tmp_path, dtype="float32")
    assert torch.allclose(loaded.model.state_dict()[name], stored[name].float() * scale, rtol=1e-6)
    assert loaded.dequantised_from is not None
    assert loaded.dequantised_from < loaded.weight_bytes


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_dequantised_weights_must_fit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    METHODS[method][0](tmp_path)
    full = load_model(tmp_path, dtype="float32").weight_bytes
    monkeypatch.setattr(weights, "memory_headroom", lambda: full * 3 // 4)
    with pytest.raises(ConfigError, match=r"dequantised to float32 from .*smaller model or dtype"):
        load_model(tmp_path, dtype="float32")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "'gptq' are not supported on this device: use the original"),
    "awq": ({"quant_method": "awq"}, "'awq' are not supported"),
    "quanto": ({"quant_method": "quanto"}, "'quanto' are not supported"),
    "no name": ({"bits": 4}, "'unnamed' are not supported"),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "would change each other: use the original"),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}},
        "only Int8WeightOnlyConfig",
    ),
    "activations": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}},
        "with activations quantised too",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_others_are_refused_by_name(kind: str) -> None:
    settings, message = REFUSED[kind]
    with pytest.raises(UnsupportedModel, match=message):
        judge(tiny_config("llama", quantization_config=settings))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = tiny_config("llama", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ConfigError, match="need the package accelerate: pip install accelerate"):
        judge(config)

"""Which device is meant, without one; and an engine whose attention is what a GPU's would be."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from support.flash import FlashOnACPU
from support.models import engine_for, loaded, prompts_of, relative_error, run, tiny_model
from vattention import LLM
from vattention.attention import varlen
from vattention.engine import devices, weights
from vattention.engine.devices import device_memory, pick_device
from vattention.engine.loading import load_model
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which torch sees two, the second of them current."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(devices, "bindings", lambda: None)
    return monkeypatch


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", "cuda:1"),
        ("cuda", "cuda:1"),
        ("cuda:0", "cuda:0"),
        (torch.device("cuda", 0), "cuda:0"),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
    ],
)
def test_names(name: Any, expected: str) -> None:
    assert str(pick_device(name)) == expected


@pytest.mark.parametrize(
    ("name", "problem"), [("cuda:2", "torch sees 2"), ("toaster", "names none"), ("mps", "not supp")]
)
def test_devices_that_are_not_there(name: str, problem: str, two_gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=problem):
        pick_device(name)


def _no_bindings() -> None:
    raise ConfigError("needs the package cuda-bindings")


@pytest.mark.parametrize(
    ("place", "name", "value", "problem"),
    [
        (torch.version, "cuda", None, "torch here has no CUDA"),
        (torch.cuda, "is_available", lambda: False, "no GPU found"),
        (devices, "bindings", _no_bindings, "cuda-bindings"),
    ],
    ids=["no build", "no GPU", "no bindings"],
)
def test_without_cuda_auto_is_the_cpu_and_cuda_an_error(
    place: Any, name: str, value: Any, problem: str, two_gpus: pytest.MonkeyPatch
) -> None:
    two_gpus.setattr(place, name, value)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=f'"?cuda.*{problem}.*or use device="cpu"'):
        pick_device("cuda")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_this_torch() -> None:
    with pytest.raises(ConfigError, match="torch here has no CUDA: install a build for CUDA"):
        LLM(loaded(tiny_model()), device="cuda")


@pytest.mark.parametrize("name", [0, None, b"cpu"])
def test_what_is_no_name(name: Any) -> None:
    with pytest.raises(TypeError, match="device"):
        pick_device(name)


@pytest.mark.usefixtures("two_gpus")
def test_a_loaded_model_stays_where_it_is() -> None:
    with pytest.raises(ConfigError, match="was loaded on cpu, not cuda"):
        LLM(loaded(tiny_model()), device="cuda")
    with LLM(loaded(tiny_model()), kv_cache_memory="4MiB") as llm:  # though "auto" would be a GPU
        assert next(llm.model.parameters()).device.type == "cpu"


@pytest.mark.usefixtures("two_gpus")
def test_what_a_gpu_does_with_one_cache_only() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs=True is for a GPU and the virtual cache"):
        LLM("never looked at", device="cuda", cache="paged", cuda_graphs=True)


def test_weights_that_do_not_fit_the_device_are_refused_before_they_are_read(
    tmp_path: Path, two_gpus: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path)
    two_gpus.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(ConfigError, match=r"for its weights, and 1000 .* of memory are left on cuda:0: take a smaller"):
        load_model(tmp_path, device="cuda:0")


def test_weights_of_the_hub_are_looked_at_before_they_move(tmp_path: Path, two_gpus: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path)
    two_gpus.setattr("vattention.engine.loading._check_files", lambda *args: None)
    two_gpus.setattr(torch.nn.Module, "to", None)
    with pytest.raises(ConfigError, match="left on cuda:0"):
        load_model(tmp_path, device="cuda:0")


def test_weights_go_to_the_device_once_they_fit(tmp_path: Path, two_gpus: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path)
    moved: list[Any] = []
    two_gpus.setattr(weights, "device_memory", lambda device: 1 << 40)
    two_gpus.setattr(torch.nn.Module, "to", lambda module, device: moved.append(device))
    load_model(tmp_path, device="cuda:0")
    assert moved == [torch.device("cuda", 0)]


@pytest.mark.usefixtures("two_gpus")
def test_memory_of_a_device() -> None:
    assert device_memory(torch.device("cuda", 0)) == 1000
    assert device_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("options", [{}, {"head_major": True}, {"layers_per_stream": 3, "kv_together": True}], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])  # mistral has a window of 16
def test_an_engine_on_the_operator(model_type: str, options: dict[str, Any]) -> None:
    """Chunks, batches that mix decodes and prompts, forks, and requests that wait: with the operator's stand-in."""
    model = loaded(tiny_model(model_type).half())
    params = [SamplingParams(temperature=0, max_tokens=4), SamplingParams(n=2, temperature=0.5, seed=1, max_tokens=4)]
    prompts, each = prompts_of(33, 5, 1, 40), [params[0], params[1], params[0], params[0]]
    flash = FlashOnACPU()
    results = []
    for operator in (None, flash, FlashOnACPU(align_right=False)):
        engine = engine_for(model, max_num_seqs=3, max_num_batched_tokens=16, guard=True, poison=True, **options)
        recorder: Any = engine._runner
        if operator is not None:
            recorder.runner = Runner(model.model, engine._cache, kernel=partial(varlen.prepare, operator=operator))
        requests = run(engine, prompts, each)
        tokens = [tuple(s.output_token_ids) for request in requests for s in request.family]
        results.append((tokens, [recorder.of(request.request_id) for request in requests]))
    (expected, exact), (tokens, logits), (_, wrong) = results
    assert tokens == expected
    assert max(relative_error(a, b) for a, b in zip(logits, exact, strict=True)) < 5e-2
    assert max(relative_error(a, b) for a, b in zip(wrong, exact, strict=True)) > 0.5  # the control
    assert {call.max_q == 1 for call in flash.calls} == {True, False}
    assert any(call.window[0] == 15 for call in flash.calls) == (model_type == "mistral")

"""The example runs, and says what transformers says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from support.models import greedy, prompts_of, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "your_own_engine.py"


def load():
    spec = importlib.util.spec_from_file_location("your_own_engine", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_same_tokens_as_transformers():
    model = tiny_model()
    prompts = prompts_of(3, 20, 41, 8, 33)
    expected = [list(greedy(model, prompt, 12)) for prompt in prompts]
    engine = load().Engine(model, max_num_seqs=3, memory="1MiB")
    with engine.cache as cache:
        assert engine.generate(prompts, 12) == expected
        assert cache.stats().live_slots == 0


def test_it_runs_as_it_is():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.count("[") == 3
    assert "CacheStats(" in done.stdout

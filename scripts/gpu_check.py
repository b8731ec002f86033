"""Everything to run when a GPU is at hand for a few minutes: the tests marked `gpu`, then what CUDA's calls cost.

Usage: make gpu-check, or python scripts/gpu_check.py [--only PART ...] [--seconds N] [--device N] [--out FOLDER]

Each part can run alone and is bounded in time. Results go to benchmarks/results/<card>/; short tables are printed last.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS_TIMEOUT = 300  # seconds
PARTS = ("tests", "calls", "runs", "bandwidth")


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--seconds", type=float, default=20, help="for each part of the benchmark (default: 20)")
    parser.add_argument("--device", type=int, default=0, help="number of the CUDA device (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of one named after the card")
    return parser.parse_args(argv)


def missing() -> str | None:
    """Why this machine cannot do it, in one line; None where it can."""
    import torch

    from vattention.errors import VAttentionError
    from vattention.memory.cuda_calls import bindings

    if torch.version.cuda is None:
        return "this torch is built without CUDA: install one from pytorch.org into .venv (make venv first)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    try:
        bindings()
    except VAttentionError as error:
        return str(error)
    return None


def card() -> dict[str, object]:
    """What the figures are of."""
    import torch

    from vattention.memory.cuda_calls import CudaCalls

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "card": device.name,
        "capability": f"{device.major}.{device.minor}",
        "device_memory_bytes": device.total_memory,
        "cuda_driver": CudaCalls()("cuDriverGetVersion"),
        "torch_cuda": torch.version.cuda,
    }


def run_tests(out: Path) -> tuple[bool, str]:
    """The tests marked gpu, in a process of their own, because a failing one may take its CUDA context with it."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "--tb=short", "-p", "no:cacheprovider", "tests/gpu"]
    log = out / "tests.txt"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=TESTS_TIMEOUT, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"not finished within {TESTS_TIMEOUT} s"
    text, passed = log.read_text() + ("" if isinstance(status, int) else f"\n{status}"), status == 0
    lines = [line for line in text.splitlines() if re.match(r"(PASSED|FAILED|SKIPPED|ERROR|PROBE)\b", line)]
    return passed, "\n".join(lines + text.strip().splitlines()[-1:])


def main(argv: list[str]) -> int:
    """Run the parts; 0 when everything passed, 1 when not or when there is no GPU."""
    args = parse(argv)
    if reason := missing():
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1

    import torch

    from vattention.bench import vmm
    from vattention.bench.machine import write_json
    from vattention.memory import CudaDriver

    torch.cuda.set_device(args.device)
    about = card()
    out = args.out or ROOT / "benchmarks" / "results" / re.sub(r"\W+", "-", str(about["card"])).strip("-").lower()
    out.mkdir(parents=True, exist_ok=True)
    passed, reports = True, []
    if "tests" in args.only:
        passed, report = run_tests(out)
        reports.append(report)
    results = {}
    parts = [part for part in args.only if part != "tests"]
    driver = CudaDriver(args.device) if parts else None
    for part in parts:
        results[part] = vmm.run(driver, part, seconds=args.seconds)
        reports.append(vmm.summary(part, results[part]))
        command = "python scripts/gpu_check.py " + " ".join(argv)
        write_json(str(out / f"vmm-{part}.json"), command, {**about, "samples": vmm.as_json({part: results[part]})})
    if results:
        vmm.plot(out / "vmm.png", results, title=f"{about['card']}: CUDA virtual memory calls")
        driver.close()
    print("\n\n".join([*reports, f"{about['card']}: results in {out}"]))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

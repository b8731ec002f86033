"""Everything to run when a GPU is at hand for a few minutes: the tests marked `gpu`, then what the paper claims.

Usage: make gpu-check, or python scripts/gpu_check.py [--only PART ...] [--seconds N] [--device N] [--out FOLDER]

Each part can run alone, in a process of its own if there are several, and is bounded in time. Results go to
benchmarks/results/<card>/; short tables are printed last. With --device cpu --tiny the parts that measure attention and
the engine run at sizes at which figures mean nothing, to try the command out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS_TIMEOUT = 300  # seconds
CALLS = ("calls", "runs", "bandwidth")
SECONDS = {**dict.fromkeys(CALLS, 20.0), "prefill": 150.0, "decode": 90.0, "layouts": 60.0, "overlap": 60.0}
SECONDS |= {"engine": 180.0, "vllm": 180.0}  # for each part, unless said otherwise
PARTS = ("tests", *SECONDS)
NAMED = ("sanitizer",)  # parts that run only when they are named
SANITIZED = "tensor_over_addresses or shared_page or cache_on_the_device or slot_views or grows_over_pages"
About = dict[str, object]
EXTRA = 240  # seconds that a part may take beyond its own: to load, to make a model, to end


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=(*PARTS, *NAMED), help="parts to run; by default all but sanitizer")
    add("--seconds", type=float, help="for each part that measures; by default 20 to 180, see SECONDS in this file")
    add("--device", default="0", help='number of the CUDA device, or "cpu" with --tiny (default: 0)')
    add("--tiny", action="store_true", help="try the command out: figures mean nothing")
    add("--out", type=Path, help="folder for the results, instead of one named after the card")
    add("--trace", help="a CSV of request lengths for layouts, engine and vllm, instead of synthetic ones")
    add("--seed", type=int, default=0, help="of lengths and tokens (default: 0)")
    add("--vllm-python", help="the Python of an environment with vLLM, for the part vllm")
    args = parser.parse_args(argv)
    if args.device != "cpu" and not args.device.isdigit():
        parser.error(f'--device {args.device}: a number, or "cpu"')
    if args.device == "cpu":
        if not args.tiny:
            parser.error("--device cpu is for trying the command out: add --tiny")
        if wrong := set(args.only or ()) & {"tests", *CALLS, *NAMED}:
            parser.error(f"{', '.join(sorted(wrong))}: needs a GPU")
    if args.only is None:
        args.only = [part for part in PARTS if args.device != "cpu" or part not in ("tests", *CALLS)]
    return args


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


def card() -> About:
    """What the figures are of."""
    import torch

    from vattention.bench.machine import version
    from vattention.memory.cuda_calls import CudaCalls

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "card": device.name,
        "capability": f"{device.major}.{device.minor}",
        "device_memory_bytes": device.total_memory,
        "cuda_driver": CudaCalls()("cuDriverGetVersion"),
        "torch_cuda": torch.version.cuda,
        "libraries": {name: version(name) for name in ("flash-attn", "flash-attn-3", "flashinfer-python", "vllm")},
    }


def run_pytest(log: Path, more: list[str], *, front: tuple[str, ...] = (), **environment: str) -> tuple[bool, str]:
    """Tests marked gpu, in a process of their own, because a failing one may take its CUDA context with it."""
    command = [*front, sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "--tb=short", "-p", "no:cacheprovider"]
    with log.open("w") as file:
        try:
            status: int | str = subprocess.run(
                [*command, "tests/gpu", *more],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=TESTS_TIMEOUT,
                check=False,
                env=os.environ | environment,
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"not finished within {TESTS_TIMEOUT} s"
    text, passed = log.read_text() + ("" if isinstance(status, int) else f"\n{status}"), status == 0
    lines = [line for line in text.splitlines() if re.match(r"(PASSED|FAILED|SKIPPED|ERROR|PROBE|=+ ERROR)\b", line)]
    return passed, "\n".join(lines + text.strip().splitlines()[-1:])


def run_sanitizer(out: Path) -> tuple[bool, str]:
    """A few of those tests under compute-sanitizer, which looks at every access of every kernel."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        return False, "sanitizer: no compute-sanitizer on the path or in /usr/local/cuda/bin: it comes with the toolkit"
    # Some tests make calls fail on purpose; torch's caching allocator would hide accesses past the end of a tensor.
    front = (found, "--error-exitcode", "9", "--report-api-errors", "no")
    passed, report = run_pytest(
        out / "sanitizer.txt", ["-k", SANITIZED], front=front, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    return passed, f"compute-sanitizer: {'clean' if passed else 'NOT clean, or a test failed'}\n{report}"


def run_alone(part: str, argv: list[str], seconds: float) -> tuple[bool, str]:
    """One part in a process of its own: whatever becomes of it, the next one begins anew."""
    kept, skip = [], False
    for word in argv:  # everything but --only and what belongs to it
        skip = word == "--only" or (skip and not word.startswith("--"))
        if not skip:
            kept.append(word)
    command = [sys.executable, str(Path(__file__)), "--only", part, *kept]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=2 * seconds + EXTRA, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"{part}: FAILED: not finished within {2 * seconds + EXTRA:.0f} s"
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return False, f"{done.stdout.strip()}\n{part}: FAILED: {said[-1] if said else f'status {done.returncode}'}"
    return True, done.stdout.strip()


def run_calls(
    parts: list[str], args: argparse.Namespace, out: Path, about: dict[str, object], command: str
) -> list[str]:
    """What CUDA's memory calls cost."""
    from vattention.bench import vmm
    from vattention.bench.machine import write_json
    from vattention.memory import CudaDriver

    results, reports = {}, []
    driver = CudaDriver(int(args.device))
    for part in parts:
        results[part] = vmm.run(driver, part, seconds=SECONDS[part] if args.seconds is None else args.seconds)
        reports.append(vmm.summary(part, results[part]))
        write_json(str(out / f"vmm-{part}.json"), command, {**about, "samples": vmm.as_json({part: results[part]})})
    vmm.plot(out / "vmm.png", results, title=f"{about['card']}: CUDA virtual memory calls")
    driver.close()
    return reports


def run_part(
    part: str, args: argparse.Namespace, out: Path, about: dict[str, object], command: str
) -> tuple[bool, str]:
    """One of the parts that measure attention and the engine: a JSON file, a picture, a table."""
    import torch

    from vattention.bench.gpu.parts import PARTS as MEASURED
    from vattention.bench.gpu.report import Setting, plot
    from vattention.bench.machine import write_json

    setting = Setting(
        torch.device("cpu") if args.device == "cpu" else torch.device("cuda", int(args.device)),
        seconds=SECONDS[part] if args.seconds is None else args.seconds,
        tiny=args.tiny,
        seed=args.seed,
        trace=args.trace,
        vllm_python=args.vllm_python,
    )
    report = MEASURED[part](setting)
    if report.skipped is not None:
        return True, f"{part}: SKIPPED: {report.skipped}"
    given = {"seconds": setting.seconds, "tiny": setting.tiny, "seed": setting.seed, "trace": setting.trace}
    write_json(str(out / f"{part}.json"), command, {**about, "part": part, "setting": given, "samples": report.samples})
    if report.panels:
        plot(out / f"{part}.png", report.panels, title=f"{about['card']}: {part}")
    return True, f"== {part}\n{report.text}"


def main(argv: list[str]) -> int:
    """Run the parts; 0 when everything passed, 1 when not or when there is no GPU."""
    args = parse(argv)
    if args.device == "cpu":
        about: About = {"card": "CPU, tiny"}
    elif reason := missing():
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1
    else:
        import torch

        torch.cuda.set_device(int(args.device))
        about = card()
    out = args.out or ROOT / "benchmarks" / "results" / re.sub(r"\W+", "-", str(about["card"])).strip("-").lower()
    out.mkdir(parents=True, exist_ok=True)
    command = "python scripts/gpu_check.py " + " ".join(argv)
    passed, reports = True, []
    if "tests" in args.only:
        passed, report = run_pytest(out / "tests.txt", [])
        reports.append(report)
    if "sanitizer" in args.only:
        clean, report = run_sanitizer(out)
        passed &= clean
        reports.append(report)
    if calls := [part for part in args.only if part in CALLS]:
        reports += run_calls(calls, args, out, about, command)
    parts = [part for part in args.only if part in SECONDS and part not in CALLS]
    for part in parts:
        if len(args.only) == 1:
            well, report = run_part(part, args, out, about, command)
        else:
            seconds = SECONDS[part] if args.seconds is None else args.seconds
            well, report = run_alone(part, [*argv, "--out", str(out)], seconds)
        passed &= well
        reports.append(report)
    print("\n\n".join([*reports, f"{about['card']}: results in {out}"]))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

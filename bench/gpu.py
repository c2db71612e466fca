"""Everything that needs a GPU, by the Python at hand: tests, compiled kernels, benchmarks; a short table last.

    python -m bench.gpu --out FOLDER           within 8 minutes: a stage that takes longer than its share is stopped
    python -m bench.gpu --out FOLDER --full    all cases, hours; the same command continues where it was interrupted
    python -m bench.gpu --plan                 only says what would be run; needs no GPU

Needs torch, triton, pytest and pytest-benchmark. Exit code 0 if all was run and right, 1 if anything failed, 3 if
nothing failed but something was not finished.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import bench_kernels
from bench.bench_kernels import UNFINISHED
from bench.group import PLAIN
from rwn_ext.describe import table
from rwn_ext.files import replacing

ROOT = Path(__file__).parents[1]
SECONDS = 480
"""What all stages together may take, without --full."""
# Those that need no package beyond the four; the others run in `make test`.
TESTS = (
    "tests/test_kernels_gpu.py", "tests/test_kernels_api.py", "tests/test_kernels_lean.py", "tests/test_compile.py",
)  # fmt: skip
# Tests compile many kernels, which processes do side by side; each takes a few hundred megabytes of the GPU.
SHARDS = min(16, max(4, os.cpu_count() or 1))
# `make gpu-csrc` needs them.
BUILD_TOOLS = ("nvcc", "cmake", "ninja")
NETWORKS = ("wrn-28-10", "resnet-50", "wrn-28-4", "vgg19-bn", "densenet-bc-100-12", "resnet-18")
PASSED, FAILED, STOPPED = "passed", "FAILED", "stopped"


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side, and how many seconds they have."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    unfinished: tuple[int, ...] = ()
    """Exit codes that say "not finished", not "wrong"."""


def stages(out: Path, full: bool, csrc: bool) -> list[Stage]:
    """What is run, in this order; `csrc`: whether its kernels can be compiled here."""
    python = sys.executable
    kernels = (python, "-m", "bench.bench_kernels", str(out))
    test = (python, "-m", "pytest", "-q", *TESTS)
    shards = tuple((*test, f"--shard={i}/{SHARDS}") for i in range(SHARDS))
    plan = [Stage("tests", shards, 7200 if full else 140)]
    if csrc:
        plan.append(Stage("csrc", (("make", "gpu-csrc"),), 3600 if full else 80))
    budget = () if full else ("--budget", "100")
    plan.append(Stage("kernels", ((*kernels, *(["--full"] if full else []), *budget),), 86400 if full else 115, (3,)))
    if full:
        plan.append(Stage("curve", ((*kernels, "--curve"),), 7200, (3,)))
    for name in NETWORKS:
        step = (
            python, "-m", "pytest", "bench/bench_steps.py", "-q", "--tested", "-k", f"[{name}-",
            f"--benchmark-json={out / f'steps-{name}.json'}", "--benchmark-disable-gc",
        )  # fmt: skip
        plan.append(Stage(f"steps {name}", ((*step, *(["--compiled"] if full else [])),), 3600 if full else 22))
    return plan


def run(stage: Stage, log: Path) -> tuple[str, float]:
    """Runs a stage's commands, their output into `log`; the outcome and the seconds it took."""
    started, outcome = time.monotonic(), PASSED
    logs = [log if len(stage.commands) == 1 else log.with_suffix(f".{i}.log") for i in range(len(stage.commands))]
    running = []
    for command, file in zip(stage.commands, logs, strict=True):
        with file.open("w") as stream:
            # A group of its own, so that what a command has started ends with it.
            running.append(
                subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
            )
    try:
        for process in running:
            code = process.wait(max(0.0, started + stage.seconds - time.monotonic()))
            if code and outcome != FAILED:
                outcome = STOPPED if code in stage.unfinished else FAILED
    except subprocess.TimeoutExpired:
        outcome = FAILED if outcome == FAILED else STOPPED
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return outcome, time.monotonic() - started


def run_all(plan: Sequence[Stage], out: Path, *, resume: bool, runner: Callable = run) -> dict[str, dict[str, Any]]:
    """Outcome and seconds by stage, kept in stages.json; with `resume`, what has passed before is not run again."""
    file = out / "stages.json"
    outcomes: dict[str, dict[str, Any]] = json.loads(file.read_text()) if resume and file.exists() else {}
    for stage in plan:
        if outcomes.get(stage.name, {}).get("outcome") == PASSED:
            continue
        print(f"{stage.name} ...", file=sys.stderr, flush=True)
        outcome, seconds = runner(stage, out / f"{stage.name.replace(' ', '-')}.log")
        outcomes[stage.name] = {"outcome": outcome, "seconds": round(seconds, 1), "limit": stage.seconds}
        with replacing(file) as part:
            part.write_text(json.dumps(outcomes, indent=1) + "\n")
    return outcomes


def summary(out: Path, plan: Sequence[Stage], outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """Kernels, training steps, stages: what the results of this folder say."""
    parts = []
    kernels = out / "kernels.json"
    if kernels.exists():
        parts.append(bench_kernels.summary(json.loads(kernels.read_text())))
    rows = [row for name in NETWORKS for row in _steps(name, out / f"steps-{name}.json")]
    if rows:
        parts.append(table(["training step", "way", "ms", f"of {PLAIN}", "of all frozen", "peak GB"], rows))
    lines = [_outcome(stage, outcomes.get(stage.name)) for stage in plan]
    parts.append(table(["stage", "outcome", "seconds", "of"], lines))
    return "\n\n".join(parts)


def _steps(network: str, file: Path) -> list[list[str]]:
    if not file.exists() or not file.stat().st_size:
        return []
    rows = []
    for entry in json.loads(file.read_text())["benchmarks"]:
        ratios = [f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]" for values in entry["ratios"].values()]
        peak = f"{entry['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in entry else ""
        rows.append([network, entry["contender"], f"{1e3 * entry['stats']['median']:.2f}", *ratios[:2], peak])
    return rows


def _outcome(stage: Stage, found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [stage.name, "not run", "", f"{stage.seconds:g}"]
    return [stage.name, found["outcome"], f"{found['seconds']:.0f}", f"{stage.seconds:g}"]


def exit_code(plan: Sequence[Stage], outcomes: Mapping[str, Mapping[str, Any]]) -> int:
    found = [outcomes.get(stage.name, {}).get("outcome") for stage in plan]
    return 1 if FAILED in found else 0 if all(outcome == PASSED for outcome in found) else UNFINISHED


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="for results and logs; default bench/results/<device>")
    parser.add_argument("--full", action="store_true", help="all cases, resumable")
    parser.add_argument("--plan", action="store_true", help="run nothing, say what would be run")
    options = parser.parse_args(arguments)
    if not (options.plan or torch.cuda.is_available()):
        print(f"error: torch {torch.__version__} finds no usable GPU; --plan needs none", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"
    out = (options.out or ROOT / "bench" / "results" / name.lower().replace(" ", "-")).absolute()
    missing = [tool for tool in BUILD_TOOLS if shutil.which(tool) is None]
    plan = stages(out, options.full, csrc=not missing)
    if missing:
        print(f"without the checks of csrc, which need {', '.join(missing)}", file=sys.stderr)
    if options.plan:
        for stage in plan:
            print(f"{stage.name}: at most {stage.seconds:g} s")
            print("\n".join(f"    {' '.join(command)}" for command in stage.commands))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(plan, out, resume=options.full)
    print(summary(out, plan, outcomes))
    return exit_code(plan, outcomes)


if __name__ == "__main__":
    sys.exit(main())

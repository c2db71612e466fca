"""Everything that needs a GPU, by the Python at hand: tests, compiled kernels, benchmarks; a short table last.

    python -m bench.gpu --out FOLDER           within 8 minutes: a stage that takes longer than its share is stopped
    python -m bench.gpu --out FOLDER --full    all cases, hours; the same command continues where it was interrupted
    python -m bench.gpu --plan                 only says what would be run; needs no GPU

Nothing is measured unless the tests pass. Needs torch, triton, pytest and pytest-benchmark. Exit code 0 if all was run
and right, 1 if anything failed, 3 if nothing failed but something was not finished.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from bench import bench_kernels, gate
from bench.bench_kernels import UNFINISHED
from bench.bench_steps import GPU_NETS
from bench.budget import LEFT_OUT
from bench.gate import PASSED
from bench.group import PLAIN
from bench.machine import commit
from rwn_ext import cuda
from rwn_ext.describe import table
from rwn_ext.files import replacing

ROOT = Path(__file__).parents[1]
SECONDS = 480
"""What all stages together may take, without --full; the last one's grace included."""
MARGIN, GRACE = 15, 10
"""Seconds: of a stage's share, what starting it and the last group that it begins take; of one that is to end."""
# What some stages need: `make gpu-csrc` programs, the demo's training packages.
BUILD_TOOLS, DEMO_PACKAGES = ("nvcc", "cmake", "ninja"), ("matplotlib", "numpy", "rich", "sklearn")
NETWORKS = tuple(net.name for net in GPU_NETS)
# Seconds by benchmark, the most important first.
LEVELS = {"steps": 75, "kernels": 50, "layers": 30, "calls": 20, "runs": 30, "scaling": 15}
FAILED, STOPPED = "FAILED", "stopped"


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side, and how many seconds they have."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    unfinished: tuple[int, ...] = ()
    """Exit codes that say "not finished", not "wrong"."""
    gate: bool = False
    """Nothing is measured unless this passes."""
    results: str | None = None
    """The file in the results' folder that it writes."""
    budgeted: bool = False
    """Its commands are told by --budget how long to begin something new."""


def stages(out: Path, full: bool, without: Collection[str] = ()) -> list[Stage]:
    """What is run, in this order; not those that this machine is `without`."""
    tests = Stage("tests", gate.commands("cuda"), 7200 if full else 180, gate=True)
    csrc = Stage("csrc", (("make", "gpu-csrc"),), 3600 if full else 70, gate=cuda.native is not None)
    measuring = _full(out) if full else _short(out)
    # Where the compiled kernels cannot be called, nothing that is measured rests on them: they can wait.
    plan = [tests, csrc, *measuring] if csrc.gate else [tests, *measuring, csrc]
    return [stage for stage in plan if stage.name not in without]


def _short(out: Path) -> list[Stage]:
    """Every level for some seconds."""
    return [
        _kernels(out, seconds, budgeted=True) if level == "kernels" else _bench(out, level, seconds, budgeted=True)
        for level, seconds in LEVELS.items()
    ]


def _full(out: Path) -> list[Stage]:
    """Everything, in parts that can be continued behind."""
    curve = Stage("curve", (_measure_kernels(out, "--curve"),), 7200, (UNFINISHED,), results="curve.json")
    steps = [_bench(out, "steps", 3600, net, "--compiled", "-k", f"[{net}-") for net in NETWORKS]
    rest = [_bench(out, level, 7200) for level in LEVELS if level not in ("steps", "kernels")]
    return [_kernels(out, 86400, "--full"), curve, *steps, *rest]


def _kernels(out: Path, seconds: float, *options: str, budgeted: bool = False) -> Stage:
    command = _measure_kernels(out, *options)
    return Stage("kernels", (command,), seconds, (UNFINISHED,), results="kernels.json", budgeted=budgeted)


def _measure_kernels(out: Path, *options: str) -> tuple[str, ...]:
    return sys.executable, "-m", "bench.bench_kernels", str(out), "--just-tested", *options


def _bench(out: Path, level: str, seconds: float, part: str = "", *options: str, budgeted: bool = False) -> Stage:
    """A file of benchmarks, or the `part` of it that `options` choose."""
    file = f"{level}-{part}.json" if part else f"{level}.json"
    command = (
        sys.executable, "-m", "pytest", f"bench/bench_{level}.py", "-q", "--just-tested", *options,
        f"--benchmark-json={out / file}", "--benchmark-disable-gc", "--benchmark-columns=median,iqr",
    )  # fmt: skip
    return Stage(f"{level} {part}".strip(), (command,), seconds, (LEFT_OUT,), results=file, budgeted=budgeted)


def run(stage: Stage, log: Path) -> tuple[str, float]:
    """Runs a stage's commands, their output into `log`; the outcome and the seconds it took."""
    started, outcome = time.monotonic(), PASSED
    logs = [log if len(stage.commands) == 1 else log.with_suffix(f".{i}.log") for i in range(len(stage.commands))]
    budget = ("--budget", f"{max(0, stage.seconds - MARGIN):.0f}") if stage.budgeted else ()
    running = []
    for command, file in zip(stage.commands, logs, strict=True):
        with file.open("w") as stream:
            running.append(start((*command, *budget), stream))
    try:
        for process in running:
            code = process.wait(max(0.0, started + stage.seconds - time.monotonic()))
            if code and outcome != FAILED:
                outcome = STOPPED if code in stage.unfinished else FAILED
    except subprocess.TimeoutExpired:
        outcome = FAILED if outcome == FAILED else STOPPED
    finally:
        end([process for process in running if process.poll() is None])
    return outcome, time.monotonic() - started


def start(command: Sequence[str], stream: IO[str], **options: Any) -> subprocess.Popen:
    """Starts a command in a group of its own, so that what it starts ends with it, and where interrupts reach it.

    They do not by themselves where whoever started this program ignores them, as for a shell's background jobs.
    """
    return subprocess.Popen(
        command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


def end(running: Sequence[subprocess.Popen]) -> None:
    """Interrupts them, so that pytest writes down what it has measured, then ends them with all they have started."""
    for process in running:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(plan: Sequence[Stage], out: Path, *, resume: bool, runner: Callable = run) -> dict[str, dict[str, Any]]:
    """Outcome and seconds by stage, kept in stages.json. What follows a gate that has not passed is not run.

    With `resume`, what has passed before by this very commit's code is not run again, but for gates. Without, what a
    stage leaves of its time goes to the next.
    """
    file, spare = out / "stages.json", 0.0
    code = None if (measured := commit())["dirty"] else measured["id"]
    outcomes: dict[str, dict[str, Any]] = json.loads(file.read_text()) if resume and file.exists() else {}
    known = {
        name for name, found in outcomes.items() if found["outcome"] == PASSED and code and found.get("commit") == code
    }
    closed = False
    for stage in plan:
        if not stage.gate and (closed or stage.name in known):
            continue
        if stage.results is not None and not resume:
            (out / stage.results).unlink(missing_ok=True)
        print(f"{stage.name} ...", file=sys.stderr, flush=True)
        limit = stage.seconds if resume else stage.seconds + spare
        outcome, seconds = runner(replace(stage, seconds=limit), out / f"{stage.name.replace(' ', '-')}.log")
        spare, closed = limit - seconds, closed or (stage.gate and outcome != PASSED)
        outcomes[stage.name] = {"outcome": outcome, "seconds": round(seconds, 1), "limit": limit, "commit": code}
        with replacing(file) as part:
            part.write_text(json.dumps(outcomes, indent=1) + "\n")
    return outcomes


def summary(out: Path, plan: Sequence[Stage], outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """Kernels, training steps, stages: what the results of this folder say, if the tests have passed."""
    stages = table(["stage", "outcome", "seconds", "of"], [_outcome(stage, outcomes.get(stage.name)) for stage in plan])
    closed = [stage.name for stage in plan if stage.gate and outcomes.get(stage.name, {}).get("outcome") != PASSED]
    if closed:
        return f"{stages}\n\nNothing was measured, because of: {', '.join(closed)}"
    parts = []
    kernels = out / "kernels.json"
    if kernels.exists():
        parts.append(bench_kernels.summary(json.loads(kernels.read_text())))
    files = [out / stage.results for stage in plan if stage.results and stage.name.startswith("steps")]
    rows = [row for file in files for row in _steps(file)]
    if rows:
        parts.append(table(["training step", "way", "ms", f"of {PLAIN}", "of all frozen", "peak GB"], rows))
    return "\n\n".join([*parts, stages])


def _steps(file: Path) -> list[list[str]]:
    if not file.exists() or not file.stat().st_size:
        return []
    rows = []
    for entry in json.loads(file.read_text())["benchmarks"]:
        ratios = [f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]" for values in entry["ratios"].values()]
        peak = f"{entry['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in entry else ""
        time = f"{1e3 * entry['stats']['median']:.2f}"
        rows.append([entry["subject"], entry["contender"], time, *ratios[:2], peak])
    return rows


def _outcome(stage: Stage, found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [stage.name, "not run", "", f"{stage.seconds:g}"]
    return [stage.name, found["outcome"], f"{found['seconds']:.0f}", f"{found['limit']:.0f}"]


def exit_code(plan: Sequence[Stage], outcomes: Mapping[str, Mapping[str, Any]]) -> int:
    found = [outcomes.get(stage.name, {}).get("outcome") for stage in plan]
    return 1 if FAILED in found else 0 if all(outcome == PASSED for outcome in found) else UNFINISHED


def missing() -> dict[str, list[str]]:
    """By stage that cannot be run here, what it lacks."""
    tools = [tool for tool in BUILD_TOOLS if shutil.which(tool) is None]
    packages = [package for package in DEMO_PACKAGES if importlib.util.find_spec(package) is None]
    return {stage: lacking for stage, lacking in (("csrc", tools), ("runs", packages)) if lacking}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="for results and logs; default bench/results/<device>, with --full <device>-full"
    )
    parser.add_argument("--full", action="store_true", help="all cases, resumable")
    parser.add_argument("--plan", action="store_true", help="run nothing, say what would be run")
    options = parser.parse_args(arguments)
    if not (options.plan or torch.cuda.is_available()):
        print(f"error: torch {torch.__version__} finds no usable GPU; --plan needs none", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"
    folder = name.lower().replace(" ", "-") + ("-full" if options.full else "")
    out = (options.out or ROOT / "bench" / "results" / folder).absolute()
    without = missing()
    for stage, lacking in without.items():
        print(f"without {stage}, which needs {', '.join(lacking)}", file=sys.stderr)
    plan = stages(out, options.full, without)
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

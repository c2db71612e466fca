"""`make gpu` without a GPU: its plan, its stages' limits, how it continues, its table; the cost model's fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import fit_costs, gpu
from bench.bench_steps import GPU_NETS
from bench.fit_costs import Fit, Sample, entered, fitted, mean_square, ratios, samples
from bench.gpu import FAILED, PASSED, STOPPED, Stage, exit_code, run, run_all, stages, summary
from bench.networks import IMAGENET
from rwn_ext import costs, cuda
from rwn_ext.costs import LibraryModel
from rwn_ext.planner import Problem

ROOT = Path(__file__).parents[1]
PLAN = [
    Stage("tests", ((), ()), 10, gate=True),
    Stage("kernels", ((),), 20, results="kernels.json"),
    Stage("steps wrn-28-10", ((),), 30, results="steps-wrn-28-10.json"),
]


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def names(plan: list[Stage]) -> list[str]:
    return [stage.name for stage in plan]


def test_the_default_plan_takes_less_than_eight_minutes_and_has_every_level(tmp_path):
    default, full = (stages(tmp_path, full) for full in (False, True))
    assert sum(stage.seconds for stage in default) + gpu.GRACE <= gpu.SECONDS == 480
    levels = {"steps", "kernels", "layers", "calls", "runs", "scaling"}
    assert set(names(default)) == {"tests", "csrc"} | levels
    assert {name.split()[0] for name in names(full)} == {"tests", "csrc", "curve"} | levels
    assert all(stage.budgeted for stage in default if stage.name in levels)
    assert not any(stage.budgeted for stage in full)
    # All of a file but bench_ceiling, which is for CPUs.
    files = {path.name for path in (ROOT / "bench").glob("bench_*.py")} - {"bench_ceiling.py", "bench_kernels.py"}
    assert files == {f"bench_{level}.py" for level in levels - {"kernels"}}


def test_every_network_of_a_gpu_has_a_stage_of_its_own(tmp_path):
    plan = stages(tmp_path, full=True)
    assert [f"steps {net.name}" for net in GPU_NETS] == [name for name in names(plan) if name.startswith("steps")]
    results = [stage.results for stage in plan if stage.results]
    assert len(results) == len(set(results))
    assert set(IMAGENET) | {"wrn-28-10", "wrn-28-4", "densenet-bc-100-12", "vgg19-bn", "alexnet"} == set(gpu.NETWORKS)


def test_the_compiled_kernels_come_first_where_they_are_measured(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "native", None)
    assert [(stage.name, stage.gate) for stage in stages(tmp_path, False)][::7] == [("tests", True), ("csrc", False)]
    monkeypatch.setattr(cuda, "native", "some module")
    plan = stages(tmp_path, False)
    assert [(stage.name, stage.gate) for stage in plan][:2] == [("tests", True), ("csrc", True)]
    assert not any(stage.gate for stage in plan[2:])
    assert names(stages(tmp_path, False, without=("csrc", "runs"))) == [
        name for name in names(plan) if name not in ("csrc", "runs")
    ]


def test_what_the_machine_lacks_is_not_planned_and_said(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None if name == "nvcc" else name)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "sklearn" else name)
    assert gpu.missing() == {"csrc": ["nvcc"], "runs": ["sklearn"]}
    assert gpu.main(["--plan"]) == 0
    output = capsys.readouterr()
    assert "without csrc, which needs nvcc" in output.err and "without runs, which needs sklearn" in output.err
    assert "bench_runs" not in output.out and "gpu-csrc" not in output.out and "bench_layers" in output.out


def test_without_a_gpu_only_the_plan_is_said(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", "somewhere"]) == 1 and not Path("somewhere").exists()
    assert "finds no usable GPU" in capsys.readouterr().err
    assert gpu.main(["--plan", "--full"]) == 0
    assert "bench.bench_kernels" in capsys.readouterr().out


def test_a_stage_passes_fails_or_is_stopped_with_all_it_started(tmp_path):
    log = tmp_path / "log"
    assert run(Stage("a", (python("print(5)"),), 60), log)[0] == PASSED and log.read_text() == "5\n"
    assert run(Stage("a", (python("pass"), python("raise SystemExit(1)")), 60), log)[0] == FAILED
    assert run(Stage("a", (python("raise SystemExit(3)"),), 60, (3,)), log)[0] == STOPPED
    sleeper = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {'import time; time.sleep(60)'!r}])"
    outcome, seconds = run(Stage("a", (python(sleeper), python("pass")), 0.5), log)
    assert outcome == STOPPED and seconds < 30
    left = subprocess.run(["pgrep", "-f", "import time; time.sleep.60"], capture_output=True, text=True).stdout
    assert not left


def test_what_is_stopped_keeps_what_it_has_measured(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "GRACE", 60)  # as long as a busy machine needs
    (tmp_path / "bench_some.py").write_text("""
import time
from pathlib import Path

def test_quick(benchmark):
    benchmark.pedantic(int)

def test_slow():
    Path(__file__).with_name("slow").touch()
    time.sleep(60)
""")
    results, log = tmp_path / "some.json", (tmp_path / "log").open("w")
    command = (sys.executable, "-m", "pytest", str(tmp_path / "bench_some.py"), f"--benchmark-json={results}")
    # Whoever runs beside others does not measure.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = gpu.start((*command, f"--rootdir={tmp_path}"), log, env=alone)
    finally:
        signal.signal(signal.SIGINT, ignored)
    while not (tmp_path / "slow").exists():
        time.sleep(0.1)
    gpu.end([process])
    assert process.poll() == pytest.ExitCode.INTERRUPTED
    assert [entry["name"] for entry in json.loads(results.read_text())["benchmarks"]] == ["test_quick"]


def test_a_command_is_told_how_long_to_begin_something_new(tmp_path):
    log, says = tmp_path / "log", python("import sys; print(*sys.argv[1:])")
    run(Stage("a", (says,), 60, budgeted=True), log)
    assert log.read_text() == f"--budget {60 - gpu.MARGIN}\n"
    run(Stage("a", (says,), gpu.MARGIN / 2, budgeted=True), log)
    assert log.read_text() == "--budget 0\n"
    run(Stage("a", (says,), 60), log)
    assert log.read_text() == "\n"


class Machine:
    """Runs nothing: remembers what it was to run for how long, and answers by name."""

    def __init__(self, **answers: str) -> None:
        self.answers, self.seen, self.limits = answers, [], {}

    def __call__(self, stage: Stage, log: Path) -> tuple[str, float]:
        self.seen.append(stage.name)
        self.limits[stage.name] = stage.seconds
        return self.answers.get(stage.name, PASSED), 4.0


@pytest.fixture
def some_commit(monkeypatch: pytest.MonkeyPatch) -> dict:
    code = {"id": "a" * 40, "dirty": False}
    monkeypatch.setattr(gpu, "commit", lambda: code)
    return code


@pytest.mark.parametrize("outcome", [FAILED, STOPPED])
@pytest.mark.parametrize("red", ["tests", "csrc"])
def test_nothing_is_measured_unless_the_tests_have_passed(tmp_path, red: str, outcome: str):
    plan = [PLAN[0], Stage("csrc", ((),), 10, gate=True), *PLAN[1:]]
    results_file(tmp_path / "kernels.json", [kernel("full wgrad", 1e-4)])
    machine = Machine(**{red: outcome})
    outcomes = run_all(plan, tmp_path, resume=False, runner=machine)
    # What the other has to say is worth knowing.
    assert machine.seen == ["tests", "csrc"] and exit_code(plan, outcomes) == (1 if outcome == FAILED else 3)
    text = summary(tmp_path, plan, outcomes)
    assert f"Nothing was measured, because of: {red}" in text and "some layer" not in text
    assert text.count("not run") == 2


def test_a_full_run_continues_behind_what_has_passed(tmp_path, some_commit):
    machine = Machine(**{"kernels": STOPPED, "steps wrn-28-10": FAILED})

    def again(resume: bool = True) -> list[str]:
        machine.seen.clear()
        outcomes = run_all(PLAN, tmp_path, resume=resume, runner=machine)
        return [*machine.seen, exit_code(PLAN, outcomes)]

    assert again() == [*names(PLAN), 1]
    machine.answers["steps wrn-28-10"] = PASSED
    assert again() == [*names(PLAN), 3]
    machine.answers["kernels"] = PASSED
    assert again() == ["tests", "kernels", 0]
    # The tests are run each time.
    assert again() == ["tests", 0] and exit_code(PLAN, {}) == 3
    assert again(resume=False) == [*names(PLAN), 0]
    some_commit["id"] = "b" * 40
    assert again() == [*names(PLAN), 0] and again() == ["tests", 0]
    # Nobody knows what changes they were.
    some_commit["dirty"] = True
    assert again() == [*names(PLAN), 0] and again() == [*names(PLAN), 0]


def test_time_that_a_stage_leaves_goes_to_the_next(tmp_path):
    machine = Machine()
    run_all(PLAN, tmp_path, resume=False, runner=machine)
    assert list(machine.limits.values()) == [10, 10 - 4 + 20, 10 - 4 + 20 - 4 + 30]
    run_all(PLAN, tmp_path / "..", resume=True, runner=machine)
    assert list(machine.limits.values()) == [10, 20, 30]


def test_results_of_an_earlier_run_do_not_stay_beside_new_ones(tmp_path):
    for stage in PLAN[1:]:
        (tmp_path / stage.results).write_text("{}")
    (tmp_path / "demo.json").write_text("{}")
    run_all(PLAN, tmp_path, resume=True, runner=Machine())
    assert all((tmp_path / stage.results).exists() for stage in PLAN[1:])
    run_all(PLAN, tmp_path, resume=False, runner=Machine())
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "stages.json"}


def results_file(path: Path, benchmarks: list[dict]) -> None:
    rates = {"bytes_per_second": 2.0e12, "flops_per_second": 6e14}
    content = {"machine_info": {"device": "NVIDIA H100 80GB HBM3", "rates": rates}, "benchmarks": benchmarks}
    path.write_text(json.dumps(content | {"failures": []}))


def kernel(contender: str, seconds: float, layer: str = "128,160,32,160,3,1", learned: str = "16/160") -> dict:
    case = {"N,C,H,K,R,stride": layer, "p": 0.1, "learned": learned, "layout": "channels_last", "numbers": "bf16"}
    return {
        "subject": "some layer", "case": case, "contender": contender, "stats": {"median": seconds},
        "bytes_per_second": 1e12, "floor_share": 0.5, "algorithm": "stationary",
    }  # fmt: skip


def test_the_table_says_what_the_results_say(tmp_path):
    results_file(
        tmp_path / "kernels.json", [kernel("full wgrad", 1e-4), kernel("stationary", 3e-5), kernel("rwn_ext", 3.1e-5)]
    )
    step = {
        "subject": "wrn-28-10", "contender": "rwn_ext p = 0.1", "stats": {"median": 0.05}, "peak_bytes": 7_000_000_000,
        "ratios": {"nn.Conv2d": [0.8, 0.79, 0.81], "all frozen (p = 0)": [1.02, 1.01, 1.03]},
    }  # fmt: skip
    results_file(tmp_path / "steps-wrn-28-10.json", [step])
    text = summary(tmp_path, PLAN, {"tests": {"outcome": PASSED, "seconds": 10.2, "limit": 10}})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "some layer 16/160 channels_last bf16 100.0 30.0 stationary 31.0 stationary 1000 50%" in lines
    assert "wrn-28-10 rwn_ext p = 0.1 50.00 0.800 [0.790, 0.810] 1.020 [1.010, 1.030] 7.00" in lines
    assert lines[-3:] == ["tests passed 10 10", "kernels not run 20", "steps wrn-28-10 not run 30"]


def test_what_a_gpu_machine_runs_needs_no_more_than_four_packages():
    """torch, triton, pytest and pytest-benchmark, with what these need themselves."""
    absent = ("hypothesis", "scipy", "sklearn", "matplotlib", "rich", "PIL", "safetensors", "expecttest", "tomli")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in {absent!r} else found(name, *a)
import bench.gpu, bench.bench_kernels, bench.fit_costs, pytest
quiet = ["-q", "--collect-only", "-p", "no:hypothesispytest"]
raise SystemExit(pytest.main([*quiet, *bench.gate.files("cuda"), "--shard=0/50"])
    or pytest.main([*quiet, *(f"bench/bench_{{level}}.py" for level in ("steps", "layers", "calls", "scaling"))]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


# What the model itself makes of constants that are not its own, with some noise: a fit must find them again.
TRUE = Fit(LibraryModel(0.4, 32, 0.25, 8), 0.7, 0.45)
LAYERS = [
    (128, 160, 32, 160, 3),
    (256, 256, 14, 256, 3),
    (64, 256, 56, 256, 3),
    (256, 768, 14, 128, 1),
    (256, 3, 64, 64, 7),
]


def synthetic(noise: float) -> list[Sample]:
    chip = replace(costs.H100, library_call=0.0, triton_call=0.0)
    found = []
    for n, c, size, k, r in LAYERS:
        for learned in (1, 4, 16, 48, 64):
            problem = Problem(
                n, c, size, size, k, learned, (r, r), padding=(r // 2,) * 2, device="cuda", channels_last=True,
                dtype="bfloat16", chip=chip,
            )  # fmt: skip
            found += [Sample(problem, name, 1.0) for name in ("full", "gather", "stationary")]
    noises = [1 + noise * (-1) ** i for i in range(len(found))]
    return [s._replace(seconds=r * f) for s, r, f in zip(found, ratios(found, TRUE), noises, strict=True)]


def test_the_fit_finds_the_constants_that_made_the_times():
    found, before = synthetic(noise=0.02), Fit.current()
    fit = fitted(found)
    assert Fit.current() == before
    assert (fit.library.filter_tile, fit.library.channel_tile) == (32, 8)
    assert fit.library.efficiency == pytest.approx(0.4, rel=0.05)
    assert fit.library.rereads == pytest.approx(0.25, abs=0.03)
    assert fit.triton_bandwidth_share == pytest.approx(0.7, rel=0.05)
    assert fit.triton_flops_share == pytest.approx(0.45, rel=0.05)
    assert mean_square(found, fit) < 0.03**2 < mean_square(found, before)


def test_measured_results_are_fitted_and_entered(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert fit_costs.main([str(tmp_path)]) == 2 and "holds no kernels.json" in capsys.readouterr().err
    results_file(tmp_path / "kernels.json", [kernel("full wgrad", 3e-4), kernel("rwn_ext", 5e-5)])
    results_file(tmp_path / "curve.json", [kernel("gather + wgrad", 1e-4, learned=f"{k}/160") for k in (1, 8, 64)])
    found = samples(tmp_path)
    assert [(s.algorithm, s.problem.learned) for s in found] == [("full", 16), *[("gather", k) for k in (1, 8, 64)]]
    assert found[0].problem.chip.bandwidth == 2.0e12 and found[0].problem.chip.name == "H100"
    target = tmp_path / "costs.py"
    target.write_text(Path(costs.__file__).read_text())
    monkeypatch.setattr(fit_costs, "COSTS", target)
    assert fit_costs.main([str(tmp_path), "--write"]) == 0
    output, written = capsys.readouterr().out, target.read_text()
    assert "now:\nfull: predicted / measured" in output and "fitted:\nfull: predicted / measured" in output
    fit = fitted(found)
    assert f"    efficiency: float = {fit.library.efficiency!r}\n" in written
    # Nothing was measured of the Triton kernels.
    assert f"TRITON_BANDWIDTH_SHARE = {costs.TRITON_BANDWIDTH_SHARE!r}\n" in written
    compile(written, "costs.py", "exec")
    with pytest.raises(fit_costs.ResultsError, match="stands 0 times"):
        entered(written.replace("TRITON_FLOPS_SHARE", "OTHER"), fit)

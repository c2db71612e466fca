"""`make gpu` without a GPU: its plan, its stages' limits, how it continues, its table; the cost model's fit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import fit_costs, gpu
from bench.fit_costs import Fit, Sample, entered, fitted, mean_square, ratios, samples
from bench.gpu import FAILED, PASSED, STOPPED, Stage, exit_code, run, run_all, stages, summary
from rwn_ext import costs
from rwn_ext.costs import LibraryModel
from rwn_ext.planner import Problem

ROOT = Path(__file__).parents[1]
PLAN = [Stage("tests", ((), ()), 10), Stage("kernels", ((),), 20), Stage("steps wrn-28-10", ((),), 30)]


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_the_default_plan_takes_less_than_eight_minutes_and_leaves_nothing_out(tmp_path):
    default, full = (stages(tmp_path, full, csrc=True) for full in (False, True))
    assert sum(stage.seconds for stage in default) <= gpu.SECONDS == 480
    assert [stage.name for stage in default] == [stage.name for stage in full if stage.name != "curve"]
    assert {"wrn-28-10", "wrn-28-4", "vgg19-bn", "densenet-bc-100-12", "resnet-18", "resnet-50"} == set(gpu.NETWORKS)
    assert ("make", "gpu-csrc") in default[1].commands
    assert "csrc" not in [stage.name for stage in stages(tmp_path, False, csrc=False)]
    assert all((ROOT / test).exists() for test in gpu.TESTS)


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


def test_a_full_run_continues_behind_what_has_passed(tmp_path):
    seen, answers = [], {"tests": PASSED, "kernels": STOPPED, "steps wrn-28-10": FAILED}

    def runner(stage: Stage, log: Path) -> tuple[str, float]:
        seen.append(stage.name)
        return answers[stage.name], 1.0

    outcomes = run_all(PLAN, tmp_path, resume=True, runner=runner)
    assert seen == list(answers) and exit_code(PLAN, outcomes) == 1
    answers["steps wrn-28-10"] = PASSED
    outcomes = run_all(PLAN, tmp_path, resume=True, runner=runner)
    assert seen[3:] == ["kernels", "steps wrn-28-10"] and exit_code(PLAN, outcomes) == 3
    answers["kernels"] = PASSED
    assert exit_code(PLAN, run_all(PLAN, tmp_path, resume=True, runner=runner)) == 0
    assert exit_code(PLAN, {}) == 3
    run_all(PLAN, tmp_path, resume=False, runner=runner)
    assert seen[6:] == list(answers)


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
    step = {"contender": "rwn_ext p = 0.1", "stats": {"median": 0.05}, "peak_bytes": 7_000_000_000,
            "ratios": {"nn.Conv2d": [0.8, 0.79, 0.81], "all frozen (p = 0)": [1.02, 1.01, 1.03]}}  # fmt: skip
    results_file(tmp_path / "steps-wrn-28-10.json", [step])
    text = summary(tmp_path, PLAN, {"tests": {"outcome": STOPPED, "seconds": 10.2}})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "some layer 16/160 channels_last bf16 100.0 30.0 stationary 31.0 stationary 1000 50%" in lines
    assert "wrn-28-10 rwn_ext p = 0.1 50.00 0.800 [0.790, 0.810] 1.020 [1.010, 1.030] 7.00" in lines
    assert lines[-3:] == ["tests stopped 10 10", "kernels not run 20", "steps wrn-28-10 not run 30"]


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
raise SystemExit(pytest.main([*quiet, *bench.gpu.TESTS, "--shard=0/50"])
    or pytest.main([*quiet, "bench/bench_steps.py"]))
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

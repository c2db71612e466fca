"""What a results file says of the machine: all that its numbers depend on, on a CPU and on a GPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import machine
from bench.results import load

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "cpu-2-cores"
FOUND = {"machine": "m", "system": "s", "python_version": "3", "cpu": {"brand_raw": "some CPU"}}


def test_a_cpu_has_instructions_and_a_library():
    found = machine.versions(FOUND, "cpu")
    assert found["device"] == "some CPU" and found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert "cuda" not in found and json.dumps(found)


@pytest.mark.parametrize(
    ("configuration", "version"),
    [("  - Intel(R) MKL-DNN v3.12.0 (Git Hash 80a)\n", "3.12.0"), ("  - oneDNN v3.7.1 (Git", "3.7.1"), ("MKL", None)],
)
def test_the_version_of_onednn_is_read(configuration: str, version: str | None):
    assert machine._onednn(configuration) == version


def test_a_gpu_has_its_driver_and_libraries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(machine, "which", lambda name: name)
    answer = SimpleNamespace(stdout="580.65.06\n580.65.06\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: answer)
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setattr(machine, "import_module", lambda name: SimpleNamespace(__version__="3.6.0"))
    found = machine.versions(FOUND, "cuda")
    gpu = {"device": "some GPU", "cuda": "13.0", "cudnn": 91300, "driver": "580.65.06", "triton": "3.6.0"}
    assert gpu.items() <= found.items()
    monkeypatch.setattr(machine, "which", lambda name: None)
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert {"driver": None, "triton": None}.items() <= machine.versions(FOUND, "cuda").items()


def test_results_that_say_less_can_still_be_read(tmp_path: Path):
    content = json.loads((RESULTS / "bench.json").read_text())
    for key in ("instructions", "onednn"):
        content["machine_info"].pop(key, None)
    (tmp_path / "bench.json").write_text(json.dumps(content))
    assert load(tmp_path).entries

"""What comes before every measurement: the tests of the device at hand, all of them green."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from bench import gate
from rwn_ext import cuda

ROOT = Path(__file__).parents[1]


@pytest.fixture
def with_all_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda, "native", "some module")


def test_a_gpu_has_tests_of_its_own_of_all_that_can_be_tested(with_all_packages, monkeypatch: pytest.MonkeyPatch):
    assert {"tests/test_kernels_gpu.py", "tests/test_ops.py"} < set(gate.files("cuda"))
    assert all((ROOT / file.partition("::")[0]).exists() for device in ("cpu", "cuda") for file in gate.files(device))
    name = gate.COMPILED.partition("::")[2]
    assert f"def {name}(" in (ROOT / "tests/test_csrc.py").read_text() and gate.COMPILED in gate.files("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda, "native", None)
    assert gate.files("cuda") == gate.ON_GPU


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_commands_together_run_every_file_once(device: str):
    commands = gate.commands(device, "-x")
    assert all("-x" in command for command in commands)
    shards = {argument for command in commands for argument in command if argument.startswith("--shard=")}
    run = [argument for command in commands for argument in command if argument.startswith("tests/")]
    assert sorted(run) == sorted(gate.files(device) * max(1, len(shards)))
    assert shards == ({f"--shard={i}/{gate.SHARDS}" for i in range(gate.SHARDS)} if device == "cuda" else set())


def test_what_fails_is_told_and_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch):
    def program(code: str) -> tuple[str, ...]:
        return sys.executable, "-c", code

    red, slow = program("print('red'); raise SystemExit(1)"), program("import time; time.sleep(600)")
    monkeypatch.setattr(gate, "commands", lambda device, *options: (slow, red))
    assert gate.failing_tests("cpu") == "red\n"
    monkeypatch.setattr(gate, "commands", lambda device, *options: (program("print('green')"),) * 2)
    assert gate.failing_tests("cpu") is None

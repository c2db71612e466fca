"""Shared by the benchmarks: options, the device, the tests that come first, what a results file says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch

from bench import gate, machine
from bench.budget import Budget
from bench.clock import clock, replay
from bench.group import Group
from bench.turns import FEWEST, Effort
from rwn_ext.paper.heap import keep_freed_memory
from rwn_ext.report import table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BUDGET = pytest.StashKey[Budget]()
_TABLES: dict[str, list[list[str]]] = {}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="a minute's worth: few layers and rounds")
    parser.addoption(
        "--budget", type=float, default=math.inf, metavar="SECONDS",
        help="begin no group of contenders after so many seconds, and the most important ones first",
    )  # fmt: skip
    gate.add_options(parser.addoption)
    parser.addoption(
        "--compiled", nargs="?", const="some", choices=("some", "all"),
        help="torch.compile too: on a CPU, where it takes a minute for each network, of one, or of all",
    )  # fmt: skip
    parser.addoption("--ceiling", action="store_true", help="bench_ceiling too, whose many rounds take minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    keep_freed_memory()
    config.stash[BUDGET] = Budget(config.option.budget)
    config.pluginmanager.register(config.stash[BUDGET])
    config.option.benchmark_timer = f"{clock.__module__}.{clock.__name__}"


def pytest_collection_modifyitems(config, items):
    left_out = {"slow"} if config.option.quick else set()
    left_out |= {name for name in ("compiled", "ceiling") if not config.getoption(name)}
    left_out |= {"all_compiled"} if config.option.compiled != "all" else set()
    for item in items:
        for name in left_out & {marker.name for marker in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=f"{name} cases are left out"))


def pytest_collection_finish(session):
    """Numbers of code that computes something else are worth nothing: none are made while the tests are red."""
    option = session.config.option
    if session.items and not (option.collectonly or option.tested):
        failure = gate.failing_tests(DEVICE)
        if failure is not None:
            pytest.exit(f"{failure[-2000:]}\n{gate.REFUSAL}", 1)


def pytest_benchmark_update_machine_info(machine_info):
    """What numbers depend on, and nothing that names the machine."""
    described = machine.described(machine_info, DEVICE, DTYPE)
    machine_info.clear()
    machine_info.update(described)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """The file keeps what a report needs: medians, spread and the facts of each contender."""
    for entry in output_json["benchmarks"]:
        stats = {key: entry["stats"][key] for key in ("median", "iqr", "rounds")}
        facts = entry["extra_info"]
        entry.clear()
        entry.update(facts, stats=stats)
    output_json["left_out"] = config.stash[BUDGET].left_out
    output_json["tests"] = gate.record(DEVICE, config.option.tested)
    output_json["commit_info"] = machine.commit()


def marks(quick: bool, compiled: bool, few: bool = True) -> list[pytest.MarkDecorator]:
    """Of a case: whether --quick measures it too, whether --compiled alone does, and not only --compiled=all."""
    compilers = [pytest.mark.compiled if few else pytest.mark.all_compiled] if compiled else []
    return ([] if quick else [pytest.mark.slow]) + compilers


@pytest.fixture
def effort(request) -> Callable[[Effort], Effort]:
    """How long to measure: as long as is asked for, a few rounds with --quick."""
    return lambda wanted: Effort(0, FEWEST, FEWEST) if request.config.option.quick else wanted


@pytest.fixture
def record(benchmark) -> Callable[[Group, str], None]:
    """Enters one contender of a measured group into pytest-benchmark's results."""

    def enter(group: Group, name: str) -> None:
        benchmark.group = f"{group.level}: {group.title}"
        facts = group.facts(name)
        benchmark.extra_info.update(facts)
        replay(benchmark, group.seconds[name])
        quartiles = statistics.quantiles(group.seconds[name], n=4)
        rows = _TABLES.setdefault(
            benchmark.group, [["", "median ms", "IQR ms", *(f"of {other}" for other in group.against), "kept MB"]]
        )
        rows.append(
            [name, f"{1000 * quartiles[1]:.3f}", f"{1000 * (quartiles[2] - quartiles[0]):.3f}"]
            + [f"{median:.3f} [{low:.3f}, {high:.3f}]" for median, low, high in facts["ratios"].values()]
            + [f"{facts['kept_bytes'] / 1e6:.2f}" if "kept_bytes" in facts else ""]
        )

    return enter


def pytest_terminal_summary(terminalreporter):
    for group, (header, *rows) in _TABLES.items():
        terminalreporter.write_line(f"\n{group}")
        terminalreporter.write_line(table(header, rows))

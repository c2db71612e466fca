"""Shared by the benchmarks: the clock, the device, the closing table of ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import pytest
import torch

from bench.clock import clock, replay
from rwn_ext.paper.timing import ratio
from rwn_ext.report import table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_ROWS: dict[str, list[list[str]]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_timer = f"{clock.__module__}.{clock.__name__}"


def pytest_benchmark_update_machine_info(machine_info):
    """What numbers depend on, and nothing that names the machine."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else machine_info["cpu"].get("brand_raw", "unknown CPU")
    kept = {key: machine_info[key] for key in ("machine", "system", "python_version")}
    machine_info.clear()
    machine_info.update(kept, device=device, torch=torch.__version__, threads=torch.get_num_threads())


@pytest.fixture
def report(benchmark) -> Callable[..., None]:
    """Records one contender of a measured group: `report(group, seconds, name, **ratios)`.

    Each ratio is named for the table and says relative to which contender: "time of nn.Conv2d's"="nn.Conv2d".
    """

    def record(group: str, seconds: Mapping[str, list[float]], name: str, relative: Mapping[str, str]) -> None:
        benchmark.group = group
        ratios = {title: ratio(seconds, name, reference) for title, reference in relative.items()}
        benchmark.extra_info.update(ratios)
        replay(benchmark, seconds[name])
        quartiles = statistics.quantiles(seconds[name], n=4)
        _ROWS.setdefault(group, [["", "median ms", "IQR ms", *relative]]).append(
            [name, f"{1000 * quartiles[1]:.3f}", f"{1000 * (quartiles[2] - quartiles[0]):.3f}"]
            + [f"{value:.3f}" for value in ratios.values()]
        )

    return record


def pytest_terminal_summary(terminalreporter):
    for group, (header, *rows) in _ROWS.items():
        terminalreporter.write_line(f"\n{group}")
        terminalreporter.write_line(table(header, rows))

"""Measured choices: times of the algorithms of a problem on this machine, kept in a readable file between processes."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rwn_ext import cuda

# Raised when an entry's meaning changes; a file of another format is not read.
FORMAT = 1
ROUNDS = 7
# One reading of the clock covers about this many seconds of calls.
READING = 2e-3

Times = dict[str, float]
"""Seconds by algorithm."""


def cache_file() -> Path:
    """Where measured times are kept: plans.json in rwn_ext's folder of the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwn_ext" / "plans.json"


def versions() -> dict[str, str | None]:
    """What the times depend on besides the device and the problem."""
    return {name: _version(name) for name in ("torch", "triton")} | {
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None,
        "kernels": f"nvcc {cuda.native.TOOLKIT} for {cuda.native.ARCHITECTURES}" if cuda.native else None,
    }


class Measurements:
    """Times by device and problem: those of the cache file, and those measured since."""

    def __init__(self) -> None:
        self._times: dict[str, dict[str, Times]] = {}

    def get(self, device: str, problem: str) -> Times | None:
        return self._times.get(device, {}).get(problem)

    def add(self, device: str, problem: str, times: Times) -> None:
        self._times.setdefault(device, {})[problem] = times

    def clear(self) -> None:
        self._times.clear()

    def load(self) -> None:
        """Adds what the cache file holds. A file that is damaged or of other versions is left alone, with a warning."""
        file = cache_file()
        try:
            times = _checked(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            warnings.warn(f"measured plans in {file} are not used: {error}", RuntimeWarning, stacklevel=2)
            return
        for device, problems in times.items():
            self._times[device] = problems | self._times.get(device, {})

    def save(self) -> None:
        """Writes the file at once or not at all. Entries that another process has added stay."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.load()
        file = cache_file()
        content = json.dumps({"format": FORMAT, "versions": versions(), "seconds": self._times}, indent=1)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(content)
            os.replace(temporary, file)
        except OSError as error:
            warnings.warn(f"measured plans are not kept: {error}", RuntimeWarning, stacklevel=2)


def timed(contenders: Mapping[str, Callable[[], Any]], clock: Callable[[], float]) -> Times:
    """The median seconds of a call of each; they take turns, so that drift of the machine hits all alike."""
    repeats: dict[str, int] = {}
    for name, run in contenders.items():
        run()
        started = clock()
        run()
        repeats[name] = max(1, min(100, int(READING / max(clock() - started, 1e-9))))
    readings: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            started = clock()
            for _ in range(repeats[name]):
                run()
            readings[name].append((clock() - started) / repeats[name])
    return {name: statistics.median(values) for name, values in readings.items()}


def device_clock(device: str) -> Callable[[], float]:
    """Seconds, after everything asked of the device is done."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _checked(content: Any) -> dict[str, dict[str, Times]]:
    """The times of a file's content. ValueError, saying why, for what this process could not have written."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    if content.get("versions") != versions():
        raise ValueError(f"they were measured with {content.get('versions')}, this is {versions()}")
    times: Any = content.get("seconds")
    if not _is_dict_of(times, lambda problems: _is_dict_of(problems, _is_times)):
        raise ValueError("its entry 'seconds' is not device -> problem -> algorithm -> seconds")
    return times


def _is_times(value: Any) -> bool:
    return bool(value) and _is_dict_of(value, lambda seconds: isinstance(seconds, float) and seconds > 0)


def _is_dict_of(value: Any, inner: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and inner(v) for key, v in value.items())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

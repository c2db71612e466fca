"""Freed memory stays with the process: large tensors made again touch no new pages."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from rwn_ext.paper.heap import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()


def fill():
    parts = [torch.full((1 << 22,), 1.0) for _ in range(4)]  # 64 MiB


fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc's malloc")
def test_freed_memory_is_used_again():
    faults = {}
    for way in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True)
        faults[way] = int(done.stdout)
    assert faults["keep"] * 10 < faults["default"], faults

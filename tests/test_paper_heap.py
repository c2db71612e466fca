"""Freed memory stays with the process: large tensors made again touch no new pages."""

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from rwn_ext.paper.heap import keep_freed_memory

assert keep_freed_memory()


def fill():
    parts = [torch.full((1 << 22,), 1.0) for _ in range(4)]  # 64 MiB


for _ in range(3):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc's malloc")
def test_freed_memory_is_used_again():
    """By default nearly every one of the 20 times touches all its pages."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    pages = (64 << 20) // resource.getpagesize()
    assert int(done.stdout) < 3 * pages

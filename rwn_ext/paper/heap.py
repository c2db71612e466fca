"""Memory that a training step frees stays with the process, for the next step."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to return nothing to the system; True where there is one that listens.

    By default it returns large blocks at once, and the system clears them page by page when the next step asks for them
    again: with DenseNet's many small layers a seventh of a step's CPU time, with others less. tcmalloc and jemalloc,
    which PyTorch's performance tuning guide advises for CPUs, keep memory too. The process's highest use of memory
    hardly changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))

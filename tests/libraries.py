"""Libraries that people use beside PyTorch, as far as they are installed."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

_OPERATORS: list[torch.library.Library] = []


def installed(name: str) -> ModuleType:
    """The imported library; skips the test where it is not installed."""
    _let_torchvision_be_imported()
    return pytest.importorskip(name, reason=f"{name} is not installed")


def _let_torchvision_be_imported() -> None:
    """A torchvision built for CUDA cannot load its operators beside a CPU torch, and does not import without two.

    No model needs them; declared without an implementation, they let it, and what imports it, be imported.
    """
    spec = importlib.util.find_spec("torchvision")
    if _OPERATORS or spec is None or spec.submodule_search_locations is None or torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    _OPERATORS.append(library)
    known = torch._C._dispatch_get_all_op_names()
    for name in ("nms", "qnms"):
        if f"torchvision::{name}" not in known:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

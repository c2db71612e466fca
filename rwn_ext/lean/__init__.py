"""Lean blocks: norm - activation - convolutions that keep for backward only what the learned part needs."""

from rwn_ext.lean.block import block
from rwn_ext.lean.rewrite import explain, make_lean, undo_lean

__all__ = ["block", "explain", "make_lean", "undo_lean"]

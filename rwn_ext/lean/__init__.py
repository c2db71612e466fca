"""Lean blocks: norm - activation - convolutions that keep for backward only what the learned part needs."""

from rwn_ext.lean.block import block

__all__ = ["block"]

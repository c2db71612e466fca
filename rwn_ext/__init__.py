"""Convolutional networks of which only a chosen part of each layer is learned, faster and in less memory."""

from rwn_ext.checkpoint import load_compact, save_compact
from rwn_ext.convert import convert, merge_state_dict, plan_budget, restore, set_subsets_, split_state_dict, subsets
from rwn_ext.draw import draw_
from rwn_ext.functional import partial_conv2d, partial_linear
from rwn_ext.modules import PartialConv1d, PartialConv2d, PartialLinear
from rwn_ext.selection import gradient_norms

__all__ = [
    "PartialConv1d",
    "PartialConv2d",
    "PartialLinear",
    "convert",
    "draw_",
    "gradient_norms",
    "load_compact",
    "merge_state_dict",
    "partial_conv2d",
    "partial_linear",
    "plan_budget",
    "restore",
    "save_compact",
    "set_subsets_",
    "split_state_dict",
    "subsets",
]
__version__ = "0.1.0"

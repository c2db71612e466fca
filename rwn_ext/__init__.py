"""Convolutional networks of which only a chosen part of each layer is learned, faster and in less memory."""

from rwn_ext.convert import convert, restore, set_subsets_, subsets
from rwn_ext.functional import partial_conv2d
from rwn_ext.modules import PartialConv2d

__all__ = ["PartialConv2d", "convert", "partial_conv2d", "restore", "set_subsets_", "subsets"]
__version__ = "0.1.0"

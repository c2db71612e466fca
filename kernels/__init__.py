"""Triton kernels of the weight gradient of a few filters, and their launchers; imported as rwn_ext.kernels.

    tiles        how a problem is cut into tiles and splits; plain Python, needs neither Triton nor a device
    halo         the small operand, gathered once into a compact buffer with its zero border made real
    correlate    the matrix product that keeps the large operand still, and the fixed-order sum of its splits
    affine_relu  the ReLU's part of a backward pass that has only what went into the normalisation before it
    depthwise    one filter a channel: a sum over pixels instead of a product
    weight_grad  the way in: which operand keeps still, then the launches

Nothing in here imports rwn_ext.
"""

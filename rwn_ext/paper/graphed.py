"""A function of tensors captured in a CUDA graph: one launch where there were hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Ordinary calls before the capture: they make the optimizer's state, choose algorithms, compile.
WARMUP = 3


class Captured:
    """`function(*inputs)`, which returns nothing and works in place, captured after WARMUP ordinary calls.

    Every call does its work once: the warming up is work too. Inputs of other shapes than the first ones (the last
    batch of an epoch), and all inputs on a CPU, get an ordinary call. What the function reads of the host (a learning
    rate, a mode) is captured with it: when that changes, capture anew.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.calls = function, 0
        self.shapes: list[torch.Size] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> None:
        shapes = [value.shape for value in inputs]
        self.shapes = shapes if self.shapes is None else self.shapes
        if not inputs[0].is_cuda or shapes != self.shapes:
            self.function(*inputs)
        elif self.calls < WARMUP:
            self.calls += 1
            self._aside(inputs)
        else:
            if self.graph is None:
                self._capture(inputs)
            assert self.graph is not None
            for own, value in zip(self.inputs, inputs, strict=True):
                own.copy_(value)
            self.graph.replay()

    def _aside(self, inputs: tuple[Tensor, ...]) -> None:
        """An ordinary call on another stream, as a capture wants it to be before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Records the function on copies of the inputs; nothing is computed."""
        self.inputs, graph = tuple(value.clone() for value in inputs), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.function(*self.inputs)
        self.graph = graph

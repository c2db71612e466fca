"""Tracing a module's forward into an fx graph, and giving a module a traced forward."""

from __future__ import annotations

import importlib
import linecache
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any, NamedTuple
from unittest import mock

from torch import fx, nn
from torch.utils import checkpoint

from rwn_ext.lean.block import has_hooks
from rwn_ext.partial_layer import PartialLayer


class CannotTrace(Exception):
    """Why a forward cannot be written down as a graph."""


def trace(module: nn.Module) -> fx.Graph:
    """The graph of `module.forward`, down to torch's own modules and those with hooks.

    Raises CannotTrace with the reason: control flow on tensors, a forward that does not say the same in training and in
    evaluation mode, activation checkpointing, ...
    """
    if "forward" in vars(module):
        raise CannotTrace("its forward has been replaced")
    graphs = []
    for training in (True, False):
        with _mode(module, training), _no_checkpointing():
            try:
                graphs.append(_Tracer().trace(module))
            except Exception as error:  # whatever a forward may raise when its input is no tensor
                raise CannotTrace(f"{type(error).__name__}: {error}") from error
    sources = {graph.python_code("self").src for graph in graphs}
    if len(sources) > 1:
        raise CannotTrace("its forward reads self.training; leave that to modules, such as nn.Dropout")
    return graphs[0]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Tracing through a module runs its hooks once, now, and never again. Subclasses of torch's modules that compute
        # what these compute are torch's, too.
        torchs_own = type(m).forward.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return isinstance(m, PartialLayer) or torchs_own or has_hooks(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """Takes `+=` for what it is: fx's own makes a new tensor of it."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    modes = {m: m.training for m in module.modules()}
    for m in modes:
        m.training = training
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def _no_checkpointing() -> Iterator[None]:
    """Makes activation checkpointing fail: traced through, it would silently be gone."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise CannotTrace("it uses activation checkpointing itself")

    with (
        mock.patch.object(checkpoint, "_checkpoint_without_reentrant_generator", refuse),
        mock.patch.object(checkpoint.CheckpointFunction, "apply", refuse),
    ):
        yield


@dataclass(frozen=True)
class Forward:
    """A forward as source code, with what it refers to by name."""

    original: type[nn.Module]
    source: str
    names: dict[str, Any]
    notes: Any = None
    """What whoever wrote it wants to remember."""

    @classmethod
    def of(cls, module: nn.Module, graph: fx.Graph, notes: Any = None) -> Forward:
        code = graph.python_code("self")
        (body,) = [c for c in compile(code.src, "<forward>", "exec").co_consts if isinstance(c, CodeType)]
        return cls(
            type(module), code.src, {name: code.globals[name] for name in body.co_names if name in code.globals}, notes
        )

    def __deepcopy__(self, memo: Any) -> Forward:
        return self

    def __getstate__(self) -> dict[str, Any]:
        names = {name: _Module(v.__name__) if isinstance(v, ModuleType) else v for name, v in self.names.items()}
        return vars(self) | {"names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {n: importlib.import_module(v.name) if isinstance(v, _Module) else v for n, v in state["names"].items()}
        vars(self).update(state | {"names": names})

    def lend(self, module: nn.Module) -> None:
        """Gives `module` this forward, through a subclass of its class: everything else of it stays as it is."""
        module.__class__ = self._subclass()

    def _subclass(self) -> type[nn.Module]:
        file = f"<lean forward of {self.original.__name__} {id(self):x}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        namespace = dict(self.names)
        exec(compile(self.source, file, "exec"), namespace)
        body = {
            "forward": namespace["forward"],
            "__module__": self.original.__module__,
            "__qualname__": self.original.__qualname__,
            "__doc__": self.original.__doc__,
            "__reduce_ex__": _reduce,
            "_lent_forward": self,
        }
        return type(self.original.__name__, (self.original,), body)


class _Module(NamedTuple):
    """Stands for a module, which cannot be pickled, by its name."""

    name: str


def lent_forward(module: nn.Module) -> Forward | None:
    """The forward that this module was lent."""
    return getattr(type(module), "_lent_forward", None)


def give_back(module: nn.Module) -> None:
    """Undoes `Forward.lend`."""
    lent = lent_forward(module)
    if lent is not None:
        module.__class__ = lent.original


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickled and copied as the original's instance, which then is lent the same forward."""
    lent = lent_forward(self)
    assert lent is not None
    _, _, state, *rest = super(type(self), self).__reduce_ex__(protocol)
    return _rebuilt, (lent,), state, *rest


def _rebuilt(lent: Forward) -> nn.Module:
    cls = lent._subclass()
    return cls.__new__(cls)

"""The paper's figures as files in figures/: which networks, on which data, what they learn, how it is drawn."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from rwn_ext.paper.sweep import combinations, shortened

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FIGURES = files("rwn_ext.paper") / "figures"


@dataclass(frozen=True)
class Preset:
    """A figure of the paper.

    Each network is given for the digits and for CIFAR; each grid lists what varies, a grid `on` one of the two only
    for it, and none for a network that is `without` one of its keys.
    """

    name: str
    title: str
    draw: str
    network: Sequence[Mapping[str, Any]]
    grid: Sequence[Mapping[str, Any]]
    program: str = "train"
    """Whose flags the choices are: train, ensemble, tasks or transfer."""

    @property
    def families(self) -> list[str]:
        return [network["family"] for network in self.network]

    def choices(
        self, on: str, families: Sequence[str], seeds: int, budget_epochs: int | None = None
    ) -> list[dict[str, Any]]:
        """What each run chooses, on "digits" or "cifar"; of the families named, else of the first."""
        unknown = [family for family in families if family not in self.families]
        if unknown:
            raise ValueError(f"family={unknown[0]!r} is not in {self.name}; choose from {', '.join(self.families)}")
        if seeds < 1:
            raise ValueError(f"seeds={seeds} trains nothing; give 1 or more")
        found = []
        for network in self.network:
            if network["family"] in (families or self.families[:1]):
                grids = [
                    {key: values for key, values in grid.items() if key != "on"} | {"seed": list(range(seeds))}
                    for grid in self.grid
                    if grid.get("on", on) == on and not set(network.get("without", ())) & set(grid)
                ]
                found += [shortened(each, budget_epochs) for each in combinations(network[on], grids)]
        return found


def names() -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in _FIGURES.iterdir() if file.name.endswith(".toml"))


def preset(name: str) -> Preset:
    if name not in names():
        raise ValueError(f"there is no figure {name!r}; choose from {', '.join(names())}")
    return Preset(name, **tomllib.loads((_FIGURES / f"{name}.toml").read_text()))

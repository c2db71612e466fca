"""The report's pictures, each with the fingerprint of the results it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.competitors import FROZEN, LORA, OURS, SLICED
from bench.group import PLAIN
from bench.results import Entry, Results, groups
from rwn_ext.paper import demo

FINGERPRINT = "Description"  # the PNG text that holds it
COLORS = {
    OURS: "tab:blue", PLAIN: "black", FROZEN: "tab:gray", SLICED: "tab:orange", "split + cat": "tab:green",
    "gradient mask": "tab:red", LORA: "tab:purple",
}  # fmt: skip


def draw_steps(results: Results, path: Path) -> None:
    """Each network's contenders as bars, relative to nn.Conv2d."""
    panels = list(groups(results.level("step")))
    if panels:
        figure = Figure(figsize=(12, 0.4 + 0.26 * max(len(rows) for _, rows in panels) + 1), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, ((_, subject, _), rows) in zip(axes, panels, strict=True):
            _bars(axis, subject, rows)
            if axis is not axes[0] and [r.contender for r in rows] == [r.contender for r in panels[0][1]]:
                axis.set_yticklabels([])
        figure.suptitle("Training step, time relative to nn.Conv2d (less is better; 95 % intervals)", size=11)
        _save(figure, results, path)


def draw_layers(results: Results, path: Path) -> None:
    """For each layer, time against the learned fraction, a line for each way."""
    panels: dict[str, list[Entry]] = {}
    for entry in results.level("layer"):
        panels.setdefault(entry.subject, []).append(entry)
    if panels:
        columns = 4
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(13, 3.2 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, (subject, entries) in zip(axes, panels.items(), strict=False):
            _lines(axis, entries, "p", title=subject)
        for axis in list(axes)[len(panels) :]:
            axis.set_visible(False)
        _legend(figure)
        figure.suptitle("Forward + backward of a layer, time relative to nn.Conv2d, by learned fraction", size=11)
        _save(figure, results, path)


def draw_scaling(results: Results, path: Path) -> None:
    """Time and kept bytes along each axis, and the bytes that DDP reduces."""
    panels: dict[str, list[Entry]] = {}
    for entry in results.level("scaling"):
        panels.setdefault(entry.subject, []).append(entry)
    reduced = panels.pop("DDP", [])
    if panels:
        figure = Figure(figsize=(3.1 * (len(panels) + 1), 6), layout="constrained")
        axes = figure.subplots(2, len(panels) + 1, squeeze=False)
        for column, (axis_name, entries) in enumerate(panels.items()):
            _lines(axes[0][column], entries, axis_name, title=f"time of nn.Conv2d's, by {axis_name}")
            _kept(axes[1][column], entries, axis_name)
        _reduced(axes[0][-1], reduced)
        axes[1][-1].set_visible(False)
        _legend(figure)
        _save(figure, results, path)


def draw_demo(results: Results, path: Path) -> None:
    """What the demo draws."""
    if results.demo is not None:
        _save(demo.drawn(results.demo), results, path)


def _save(figure: Figure, results: Results, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={FINGERPRINT: results.fingerprint})


def _bars(axis: Axes, title: str, rows: list[Entry]) -> None:
    names = [row.contender for row in rows]
    ratios = [row.ratios[PLAIN] for row in rows]
    colors = [next((color for key, color in COLORS.items() if key in name), "tab:brown") for name in names]
    errors = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    axis.barh(names, [r.median for r in ratios], xerr=errors, color=colors, ecolor="dimgray")
    axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axis.invert_yaxis()
    axis.set_title(title, size=10)
    axis.tick_params(labelsize=7)


def _lines(axis: Axes, entries: list[Entry], key: str, *, title: str) -> None:
    for name in dict.fromkeys(entry.contender for entry in entries):
        own = [entry for entry in entries if entry.contender == name]
        xs, ratios = [entry.case[key] for entry in own], [entry.ratios[PLAIN] for entry in own]
        style: dict[str, Any] = {"color": COLORS.get(name, "tab:brown"), "label": name}
        axis.plot(xs, [r.median for r in ratios], "o-", markersize=3, linewidth=1.2, **style)
        axis.fill_between(xs, [r.low for r in ratios], [r.high for r in ratios], color=style["color"], alpha=0.15)
    axis.set_title(title, size=9)
    axis.set_ylim(bottom=0)
    _axis(axis, key)


def _kept(axis: Axes, entries: list[Entry], key: str) -> None:
    for name in dict.fromkeys(entry.contender for entry in entries):
        own = [entry for entry in entries if entry.contender == name and entry.kept_bytes is not None]
        axis.plot(
            [e.case[key] for e in own], [(e.kept_bytes or 0) / 1e6 for e in own], "o-", markersize=3, linewidth=1.2,
            color=COLORS.get(name, "tab:brown"),
        )  # fmt: skip
    axis.set_title(f"MB kept for backward, by {key}", size=9)
    axis.set_ylim(bottom=0)
    _axis(axis, key)


def _reduced(axis: Axes, entries: list[Entry]) -> None:
    if not entries:
        axis.set_visible(False)
        return
    plain = entries[0].facts["reduced_bytes_plain"]
    shares = [entry.facts["reduced_bytes"] / plain for entry in entries]
    axis.plot([entry.case["p"] for entry in entries], shares, "o-", markersize=3, color=COLORS[OURS])
    axis.set_title(f"bytes DDP reduces, of nn.Conv2d's\n({entries[0].case['net']}, {plain / 1e6:.0f} MB)", size=9)
    _axis(axis, "p")


def _axis(axis: Axes, key: str) -> None:
    if key in ("batch", "image", "channels"):
        axis.set_xscale("log", base=2)
    axis.set_xlabel(key, size=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)

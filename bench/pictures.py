"""The report's pictures, each with the fingerprint of the results it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.competitors import CHECKPOINTED, FROZEN, LEAN, LORA, OURS, SLICED
from bench.group import PLAIN
from bench.results import Entry, Results, groups
from rwn_ext.paper import demo

FINGERPRINT = "Description"  # the PNG text that holds it
# The first name that a contender's holds gives its colour.
COLORS = {
    LEAN: "tab:cyan", OURS: "tab:blue", CHECKPOINTED: "tab:olive", PLAIN: "black", FROZEN: "tab:gray",
    SLICED: "tab:orange", "split + cat": "tab:green", "gradient mask": "tab:red", LORA: "tab:purple",
}  # fmt: skip
PREDICTED = f"{OURS}, predicted"


def draw_steps(results: Results, path: Path) -> None:
    """Each network's contenders as bars, relative to nn.Conv2d."""
    panels = list(groups(results.level("step")))
    if panels:
        columns = min(4, len(panels))
        lines = -(-len(panels) // columns)
        tallest = max(len(rows) for _, rows in panels)
        figure = Figure(figsize=(max(7.0, 3.6 * columns + 0.8), lines * (0.7 + 0.22 * tallest)), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axis, ((_, subject, _), rows) in zip(axes, panels, strict=False):
            _bars(axis, subject, rows)
        _hide(axes[len(panels) :])
        figure.suptitle("Training step, time relative to nn.Conv2d (less is better; 95 % intervals)", size=11)
        _save(figure, results, path)


def draw_layers(results: Results, path: Path) -> None:
    """For each layer, time against the learned fraction, a line for each way."""
    panels: dict[str, list[Entry]] = {}
    for entry in results.level("layer"):
        panels.setdefault(entry.subject, []).append(entry)
    if panels:
        columns = min(4, max(2, len(panels)))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.3 * columns, 3.2 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, (subject, entries) in zip(axes, panels.items(), strict=False):
            _lines(axis, entries, "p", title=subject)
        _hide(axes[len(panels) :])
        _legend(figure)
        figure.suptitle(
            "Forward + backward of a layer, time relative to nn.Conv2d, by learned fraction (less is better)", size=11
        )
        _save(figure, results, path)


def draw_scaling(results: Results, path: Path) -> None:
    """Time and kept bytes along each axis, and the bytes that DDP sends."""
    panels: dict[str, list[Entry]] = {}
    for entry in results.level("scaling"):
        panels.setdefault(entry.subject, []).append(entry)
    sent = [entry for entry in panels.pop("DDP", []) if "sent_bytes" in entry.facts]
    if panels:
        columns = len(panels) + 1
        figure = Figure(figsize=(3.1 * columns, 6), layout="constrained")
        axes = figure.subplots(2, columns, squeeze=False)
        for column, (name, entries) in enumerate(panels.items()):
            _lines(axes[0][column], entries, name, title=f"time of nn.Conv2d's, by {_words(name)}")
            _kept(axes[1][column], entries, name)
        if sent:
            _sent(axes[0][-1], sent, "processes", "p", lambda p: f"p = {p:g}")
            _sent(axes[1][-1], sent, "p", "processes", lambda count: f"{count} processes")
        else:
            _hide([axes[0][-1], axes[1][-1]])
        _legend(figure)
        _save(figure, results, path)


def draw_demo(results: Results, path: Path) -> None:
    """What the demo draws."""
    if results.demo is not None:
        _save(demo.drawn(results.demo), results, path)


def _save(figure: Figure, results: Results, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={FINGERPRINT: results.fingerprint})


def _hide(axes: list[Axes]) -> None:
    for axis in axes:
        axis.set_visible(False)


def _color(name: str) -> str:
    return next((color for key, color in COLORS.items() if key in name), "tab:brown")


def _bars(axis: Axes, title: str, rows: list[Entry]) -> None:
    names = [row.contender for row in rows]
    ratios = [row.ratios[PLAIN] for row in rows]
    errors = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    axis.barh(names, [r.median for r in ratios], xerr=errors, color=[_color(name) for name in names], ecolor="dimgray")
    axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axis.invert_yaxis()
    axis.set_title(title, size=10)
    axis.tick_params(labelsize=7)


def _lines(axis: Axes, entries: list[Entry], key: str, *, title: str) -> None:
    highest = 1.0
    for name in dict.fromkeys(entry.contender for entry in entries):
        own = [entry for entry in entries if entry.contender == name]
        if len(own) < 2:
            continue  # such as the compiled ones, which have one point
        xs, ratios = [entry.case[key] for entry in own], [entry.ratios[PLAIN] for entry in own]
        style: dict[str, Any] = {"color": _color(name), "label": name.partition(" p = ")[0]}
        highest = max(highest, *(r.median for r in ratios))
        axis.plot(xs, [r.median for r in ratios], "o-", markersize=3, linewidth=1.2, **style)
        axis.fill_between(xs, [r.low for r in ratios], [r.high for r in ratios], color=style["color"], alpha=0.15)
    _predicted(axis, entries, key)
    axis.set_title(title, size=9)
    # An interval may leave the picture, a median not.
    axis.set_ylim(0, 1.15 * highest)
    _axis(axis, key)


def _predicted(axis: Axes, entries: list[Entry], key: str) -> None:
    """The cost model's ratio of ours to nn.Conv2d."""
    plain = {entry.group: entry.predicted for entry in entries if entry.contender == PLAIN}
    ours = [e for e in entries if e.predicted is not None and _color(e.contender) == COLORS[OURS]]
    if ours:
        ratios = [(e.predicted or 0.0) / (plain[e.group] or 1.0) for e in ours]
        axis.plot([e.case[key] for e in ours], ratios, "--", color=COLORS[OURS], linewidth=1.2, label=PREDICTED)


def _kept(axis: Axes, entries: list[Entry], key: str) -> None:
    for name in dict.fromkeys(entry.contender for entry in entries):
        own = [entry for entry in entries if entry.contender == name and entry.kept_bytes is not None]
        axis.plot(
            [e.case[key] for e in own], [(e.kept_bytes or 0) / 1e6 for e in own], "o-", markersize=3, linewidth=1.2,
            color=_color(name),
        )  # fmt: skip
    axis.set_title(f"MB kept for backward, by {_words(key)}", size=9)
    axis.set_ylim(bottom=0)
    _axis(axis, key)


def _sent(axis: Axes, entries: list[Entry], key: str, by: str, label: Callable[[Any], str]) -> None:
    """Megabytes, measured, and dotted what a perfect ring would send."""
    for value in dict.fromkeys(entry.case[by] for entry in entries):
        own = [entry for entry in entries if entry.case[by] == value]
        xs = [entry.case[key] for entry in own]
        (line,) = axis.plot(xs, [e.facts["sent_bytes"] / 1e6 for e in own], "o-", markersize=3, label=label(value))
        axis.plot(xs, [e.facts["ring_bytes"] / 1e6 for e in own], ":", color=line.get_color())
    axis.set_title(f"MB a process sends a step under DDP,\nby {_words(key)} (dotted: a perfect ring)", size=9)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
    _axis(axis, key)
    if key == "processes":
        axis.set_xticks(sorted({entry.case[key] for entry in entries}))


def _words(key: str) -> str:
    return {"p": "learned fraction", "image": "image size"}.get(key, key)


def _axis(axis: Axes, key: str) -> None:
    if key in ("batch", "image", "channels"):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel(_words(key), size=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def _legend(figure: Figure) -> None:
    """Of all panels' lines, each name once."""
    known = {}
    for axis in figure.axes:
        if axis.get_legend() is None:
            handles, labels = axis.get_legend_handles_labels()
            known |= dict(zip(labels, handles, strict=True)) | known
    columns = max(1, min(len(known), int(figure.get_figwidth() / 1.6)))
    figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=columns, fontsize=8)

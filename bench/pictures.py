"""The report's pictures, each with a fingerprint of the results that it shows and of the code that draws it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from bench.competitors import CHECKPOINTED, FROZEN, LEAN, LORA, OURS, SLICED, Row
from bench.group import PLAIN
from bench.results import Entry, Results, groups
from rwn_ext.paper import demo, drawing

FINGERPRINT = "Description"  # the PNG text that holds it
WIDTH = 9.6  # inches, which a page shows without shrinking letters much
PREDICTED = f"{OURS}, predicted"


class Picture(NamedTuple):
    """What a picture shows, what draws that, and the file of its code."""

    shown: Any
    draw: Callable[[Any], Figure]
    code: str

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.shown).encode() + Path(self.code).read_bytes()).hexdigest()


def pictures(results: Results) -> dict[str, Picture]:
    """By file name, those for which there are results."""
    found = {
        "demo.png": Picture(results.demo, demo.drawn, demo.__file__),
        "steps.png": Picture(results.level("step"), steps, __file__),
        "layers.png": Picture(results.level("layer"), layers, __file__),
        "scaling.png": Picture(results.level("scaling"), scaling, __file__),
    }
    for name, content in results.paper.items():
        found[f"paper/{name}/figure.png"] = Picture(content, drawing.drawn, drawing.__file__)
    return {name: picture for name, picture in found.items() if picture.shown}


def draw(results: Results, folder: Path) -> None:
    """Writes the pictures into the folder of the results."""
    for name, picture in pictures(results).items():
        figure = picture.draw(picture.shown)
        figure.savefig(folder / name, dpi=120, metadata={FINGERPRINT: picture.fingerprint})


def outdated(results: Results, folder: Path) -> list[str]:
    """The pictures that are missing there, or show other results, or were drawn by other code."""
    return [name for name, picture in pictures(results).items() if _fingerprint(folder / name) != picture.fingerprint]


def _fingerprint(path: Path) -> str | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(FINGERPRINT)


def steps(entries: Sequence[Entry]) -> Figure:
    """Each network's contenders as bars, relative to nn.Conv2d, on the same lines and the same scale."""
    panels = list(groups(entries))
    names = list(dict.fromkeys(entry.contender for entry in entries))
    figure, axes = _grid(len(panels), 4, 0.5 + 0.17 * len(names), shared=True)
    ways = looks(names)
    for axis, ((_, subject, _), rows) in zip(axes, panels, strict=False):
        for row in rows:
            _bar(axis, names.index(row.contender), row, ways[Row.of(row.contender).way].color)
        axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(subject, size=10)
        # An interval may leave the picture, a median not.
        axis.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.12 * max(entry.ratios[PLAIN].median for entry in entries)))
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.grid(axis="x", alpha=0.3)
    _hide(axes[len(panels) :])
    figure.suptitle("Training step, time relative to nn.Conv2d (less is better; lines are 95 % intervals)", size=11)
    return figure


def layers(entries: Sequence[Entry]) -> Figure:
    """For each layer, time against the learned fraction, a line for each way."""
    panels = _by_subject(entries)
    figure, axes = _grid(len(panels), 4, 2.5, shared=True)
    ways, highest = looks(e.contender for e in entries), max(e.ratios[PLAIN].median for e in entries)
    for axis, (subject, own) in zip(axes, panels.items(), strict=False):
        _times(axis, own, "p", ways, highest)
        axis.set_title(subject, size=10)
    _hide(axes[len(panels) :])
    _legend(figure)
    title = "Forward + backward of a layer, time relative to nn.Conv2d, by learned fraction\n"
    figure.suptitle(f"{title}(less is better; pale: 95 % intervals)", size=11)
    return figure


def scaling(entries: Sequence[Entry]) -> Figure:
    """Time and kept bytes along each axis, and the bytes that DDP sends: first all times, then all bytes."""
    panels = _by_subject(entries)
    sent = [entry for entry in panels.pop("DDP", []) if "sent_bytes" in entry.facts]
    ways = looks(e.contender for own in panels.values() for e in own)
    count = len(panels) + bool(sent)
    half = 3 * -(-count // 3)
    figure, axes = _grid(2 * half, 3, 2.6)
    for i, (key, own) in enumerate(panels.items()):
        _times(axes[i], own, key, ways, max(e.ratios[PLAIN].median for e in own))
        axes[i].set_title(f"time relative to nn.Conv2d,\nby {_words(key)}", size=10)
        _kept(axes[half + i], own, key, ways)
        axes[half + i].set_title(f"bytes kept, relative to nn.Conv2d,\nby {_words(key)}", size=10)
    if sent:
        _sent(axes[count - 1], sent, "processes", "p", lambda p: f"p = {p:g}")
        _sent(axes[half + count - 1], sent, "p", "processes", lambda n: f"{n} processes")
    _hide([*axes[count:half], *axes[half + count :]])
    _legend(figure)
    figure.suptitle("Scaling, one axis at a time (less is better; pale: 95 % intervals)", size=11)
    return figure


class Look(NamedTuple):
    """How a way to learn is drawn."""

    color: str
    marker: str


LOOKS = {
    PLAIN: Look("black", "o"), "gradient mask": Look("tab:red", "v"), "split + cat": Look("tab:green", "^"),
    SLICED: Look("tab:orange", "D"), LORA: Look("tab:purple", "X"), OURS: Look("tab:blue", "o"),
    LEAN: Look("tab:cyan", "s"), FROZEN: Look("tab:gray", "P"), CHECKPOINTED: Look("tab:olive", "<"),
}  # fmt: skip
OTHER_LOOKS = (
    Look("tab:pink", ">"), Look("teal", "p"), Look("gold", "h"), Look("navy", "*"), Look("lime", "d"),
    Look("salmon", "8"), Look("indigo", "H"), Look("saddlebrown", "p"),
)  # fmt: skip


def looks(contenders: Iterable[str]) -> dict[str, Look]:
    """Of each way among the contenders; those that LOOKS does not know share out the others."""
    ways = sorted({Row.of(name).way for name in contenders})
    unknown = [way for way in ways if way not in LOOKS]
    return LOOKS | {way: OTHER_LOOKS[i % len(OTHER_LOOKS)] for i, way in enumerate(unknown)}


def _by_subject(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.subject, []).append(entry)
    return found


def _by_contender(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    names = dict.fromkeys(entry.contender for entry in entries)
    return [(name, [entry for entry in entries if entry.contender == name]) for name in names]


def _grid(count: int, columns: int, height: float, *, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """Panels in lines of at most `columns`, each `height` inches tall; `shared`: of the same scales."""
    width, columns = WIDTH * max(0.5, min(1, count / columns)), min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(width, 0.9 + lines * height), layout="constrained")
    return figure, list(figure.subplots(lines, columns, sharex=shared, sharey=shared, squeeze=False).flat)


def _hide(axes: Iterable[Axes]) -> None:
    for axis in axes:
        axis.set_visible(False)


def _bar(axis: Axes, place: int, row: Entry, color: str) -> None:
    """Hatched where compiled or captured."""
    ratio = row.ratios[PLAIN]
    reach = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
    style: dict[str, Any] = {"color": color}
    if Row.of(row.contender).form:
        style = {"facecolor": to_rgba(color, 0.3), "edgecolor": color, "hatch": "/////", "linewidth": 0}
    axis.barh([place], [ratio.median], xerr=reach, ecolor="dimgray", **style)


def _times(axis: Axes, entries: Sequence[Entry], key: str, ways: dict[str, Look], highest: float) -> None:
    own = _by_contender(entries)
    for place, (name, points) in enumerate(own, 1):
        xs, ratios = [entry.case[key] for entry in points], [entry.ratios[PLAIN] for entry in points]
        style, width = _style(name, ways), 1.2 + 0.2 * (len(own) - place)
        form = ":" if Row.of(name).form else "-"
        axis.plot(xs, [r.median for r in ratios], form, linewidth=width, markersize=3.5 + 0.6 * width, **style)
        lows, highs = [r.low for r in ratios], [r.high for r in ratios]
        axis.fill_between(xs, lows, highs, color=style["color"], alpha=0.12, linewidth=0)
    _predicted(axis, entries, key)
    # An interval may leave the picture, a median not.
    axis.set_ylim(0, 1.12 * highest)
    _axis(axis, key)


def _predicted(axis: Axes, entries: Sequence[Entry], key: str) -> None:
    """The cost model's ratio of ours to nn.Conv2d."""
    plain = {entry.group: entry.predicted for entry in entries if entry.contender == PLAIN}
    ours = [e for e in entries if e.predicted is not None and Row.of(e.contender).way == OURS and plain.get(e.group)]
    if ours:
        ratios = [(e.predicted or 0.0) / (plain[e.group] or 1.0) for e in ours]
        style: dict[str, Any] = {"color": LOOKS[OURS].color, "linewidth": 1.2, "label": PREDICTED}
        axis.plot([e.case[key] for e in ours], ratios, "--", **style)


def _kept(axis: Axes, entries: Sequence[Entry], key: str, ways: dict[str, Look]) -> None:
    plain = {entry.group: entry.kept_bytes for entry in entries if entry.contender == PLAIN}
    own = _by_contender([entry for entry in entries if entry.kept_bytes is not None and plain.get(entry.group)])
    for place, (name, points) in enumerate(own, 1):
        shares = [(e.kept_bytes or 0) / (plain[e.group] or 1) for e in points]
        # Many coincide: each is narrower than the last, and every other one has gaps.
        width, dashes = 1.2 + 6 * (len(own) - place) / len(own), "-" if place % 2 else (0, (1.5, 1))
        axis.plot(
            [e.case[key] for e in points],
            shares,
            linestyle=dashes,
            linewidth=width,
            markersize=3.5 + 0.6 * width,
            **_style(name, ways),
        )
    axis.set_ylim(bottom=0)
    _axis(axis, key)


def _style(name: str, ways: dict[str, Look]) -> dict[str, Any]:
    look = ways[Row.of(name).way]
    return {"color": look.color, "marker": look.marker, "label": Row.of(name).form + Row.of(name).way}


def _sent(axis: Axes, entries: Sequence[Entry], key: str, by: str, label: Callable[[Any], str]) -> None:
    """Megabytes, measured, on a broad pale line of what a perfect ring would send."""
    values = sorted({entry.case[by] for entry in entries})
    for i, value in enumerate(values):
        own = [entry for entry in entries if entry.case[by] == value]
        xs, color = [entry.case[key] for entry in own], colormaps["copper_r"]((i + 1) / len(values))
        axis.plot(xs, [e.facts["ring_bytes"] / 1e6 for e in own], color=color, linewidth=6, alpha=0.3)
        measured = [e.facts["sent_bytes"] / 1e6 for e in own]
        axis.plot(xs, measured, color=color, marker="o", markersize=3.5, linewidth=1.2, label=label(value))
    axis.set_title(f"MB a process sends under DDP,\nby {_words(key)} (pale: a perfect ring)", size=10)
    # The legend stands above the lines.
    axis.set_ylim(0, 1.4 * max(entry.facts["sent_bytes"] / 1e6 for entry in entries))
    axis.legend(fontsize=7, ncols=2, loc="upper left")
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
    axis.tick_params(labelsize=8, labelbottom=True)
    axis.grid(alpha=0.3)


def _legend(figure: Figure) -> None:
    """Of all panels' lines, each name once."""
    known = {}
    for axis in figure.axes:
        if axis.get_legend() is None:
            handles, labels = axis.get_legend_handles_labels()
            known |= dict(zip(labels, handles, strict=True)) | known
    figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=5, fontsize=8)

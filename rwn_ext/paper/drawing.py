"""The page and the picture of a figure, from its results."""

from __future__ import annotations

import math
import statistics
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIXED = {
    "random": "fixed at random", "zero": "zeroed", "he": "fixed at random, He", "orthogonal": "fixed, orthogonal",
    "signed": "fixed, signed constant",
}  # fmt: skip
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
Rows = list[dict[str, Any]]


def drawn(results: dict[str, Any]) -> Figure:
    """A row of panels for each network: accuracy, with the paper's points hollow, then speed and memory."""
    nets = _networks(results["rows"])
    costs = any(row.get("step_ratio") is not None for row in results["rows"])
    columns = 2 if costs else 1
    figure = Figure(figsize=(6.5 * columns, 0.6 + 3.8 * len(nets)), layout="constrained")
    panels = figure.subplots(len(nets), columns, squeeze=False)
    for line, (net, rows) in zip(panels, nets.items(), strict=True):
        if results["draw"] == "magnitudes":
            _magnitudes(line[0], rows)
        elif results["draw"] == "weights":
            _over_weights(line[0], rows)
        elif results["draw"] == "ensemble":
            _ensembles(line[0], rows)
        else:
            _over_categories(line[0], rows, results["draw"])
        epochs = sorted({row["epochs"] for row in rows})
        line[0].set_title(f"{net}, {'/'.join(map(str, epochs))} epochs", size=10)
        if costs:
            _costs(line[1], rows, results["draw"])
    figure.suptitle(textwrap.fill(f"{results['title']} ({results['data']})", 60 * columns), size=11)
    return figure


def page(results: dict[str, Any]) -> str:
    """A table for each network and what its columns mean."""
    rows = results["rows"]
    lines = [f"# {results['title']}", "", "![the picture of these tables](figure.png)", ""]
    for net, own in _networks(rows).items():
        columns = [(name, cells) for name, of in _COLUMNS for cells in [[of(row) for row in own]] if any(cells)]
        lines += [f"## {net}, {own[0]['epochs']} epochs, {results['data']}", ""]
        lines += [_line([name for name, _ in columns]), _line(["---"] + ["---:"] * (len(columns) - 1))]
        lines += [_line([cells[i] for _, cells in columns]) for i in range(len(own))] + [""]
        apart = [abs(row["difference"]) for row in own if row["difference"] is not None]
        if apart:
            mean = statistics.fmean(apart)
            lines += [f"Mean absolute difference to the paper: {mean:.2f} points over {len(apart)} rows.", ""]
    if results["draw"] in ("ensemble", "task", "transfer"):
        lines.append("Accuracy is that of the stored networks, on the test set after the last epoch; mean over seeds.")
    else:
        lines.append("Accuracy is the highest test accuracy over the epochs: mean and standard deviation over seeds.")
    if any(row["paper"] for row in rows):
        sources = dict.fromkeys(row["paper"]["source"] for row in rows if row["paper"])
        lines.append(
            f"The paper's numbers: {'; '.join(sources)}. Those with ~ were read off a plot, to about a point. A "
            "difference stands where both trained for equally many epochs."
        )
    if results["machine"]:
        lines.append(
            f"Steps were timed in turn with those of the same network in plain `nn.Conv2d` that learns everything, in "
            f"one process ({results['machine']}); kept is what stays from forward to backward."
        )
    return "\n".join(lines) + "\n"


def _networks(rows: Rows) -> dict[str, Rows]:
    nets: dict[str, Rows] = {}
    for row in rows:
        nets.setdefault(row["net"], []).append(row)
    return nets


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _word(row: dict[str, Any]) -> str:
    """What is learned, as an axis or a table says it."""
    what = row["learned"]
    if isinstance(what, int):
        return "1 filter" if what == 1 else f"{what} filters"
    return {"nothing": "BN only"}.get(what, str(what))


def _accuracy(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "not finished"
    return f"{row['mean']:.2f}" + ("" if row["spread"] is None else f" ± {row['spread']:.2f}")


def _mark(mark: dict[str, Any] | None, row: dict[str, Any]) -> str:
    if mark is None:
        return ""
    told = f"{'~' if mark['read_off'] else ''}{mark['accuracy']:.2f}"
    return told if mark["epochs"] == row["epochs"] else f"{told} ({mark['epochs']} epochs)"


def _fixed(row: dict[str, Any]) -> str:
    if row["learned"] == "all":
        return ""
    # What begins with a trained network fixes trained weights.
    return (
        "fixed as trained" if row.get("start-epochs") else FIXED.get(row.get("frozen", "random"), row.get("frozen", ""))
    )


def _number(key: str, form: str, unit: float = 1) -> Any:
    return lambda row: "" if row.get(key) is None else format(row[key] if unit == 1 else row[key] / unit, form)


def _magnitude(kind: str) -> Any:
    return lambda row: "" if not row.get("magnitudes") or row["magnitudes"][kind] is None else (
        f"{row['magnitudes'][kind]:.4f}"
    )  # fmt: skip


_COLUMNS = (
    ("learned", _word),
    ("task", lambda row: row.get("task", "")),
    ("others", _fixed),
    ("along", lambda row: "" if row.get("dim") is None else ("filters", "inputs", "rows", "columns")[row["dim"]]),
    ("BatchNorm", lambda row: row.get("bn", "")),
    ("gamma", lambda row: row.get("gamma", "")),
    ("mean member, %", _number("member", ".2f")),
    ("paper's mean member, %", lambda row: _mark(row.get("paper_member"), row)),
    ("test accuracy, %", _accuracy),
    ("runs", lambda row: str(row["runs"])),
    ("paper, %", lambda row: _mark(row["paper"], row)),
    ("difference", _number("difference", "+.2f")),
    ("weights learned", _number("learned_weights", ",")),
    ("learned magnitude", _magnitude("learned")),
    ("fixed magnitude", _magnitude("fixed")),
    ("step, of nn.Conv2d's", _number("step_ratio", ".2f")),
    ("gradients + optimizer, MB", _number("training_bytes", ".2f", 1e6)),
    ("kept, MB", _number("saved_bytes", ".1f", 1e6)),
    ("stored, MB", _number("stored_bytes", ".3f", 1e6)),
    ("time of a run, s", _number("seconds", ".0f")),
)


def _order(row: dict[str, Any]) -> tuple[int, float]:
    """Along an axis: BatchNorm alone, counts of filters, fractions, parts as they come, all."""
    what = row["learned"]
    if isinstance(what, str):
        return {"nothing": 0, "all": 4}.get(what, 3), 0.0
    return (1 if isinstance(what, int) else 2), float(what)


def _groups(rows: Rows, draw: str) -> dict[str, Rows]:
    """The lines of a panel; what learns everything belongs to the first."""
    key, default = ("bn", "learned") if draw == "bn" else ("frozen", "random")
    groups: dict[str, Rows] = {}
    if draw == "task":
        for row in rows:
            groups.setdefault(f"learned: {_word(row)}", []).append(row)
        return groups
    for row in rows:
        value = row.get(key, default)
        name = FIXED.get(str(value), str(value)) if key == "frozen" else f"BatchNorm {value}"
        name += ", gamma uniform" if row.get("gamma") == "uniform" else ""
        groups.setdefault(name, []).append(row)
    return groups


def _category(row: dict[str, Any], draw: str) -> str:
    if draw == "task":
        return row["task"]
    return ("filters", "inputs", "rows", "columns")[row["dim"]] if draw == "dim" else _word(row)


def _categories(rows: Rows, draw: str) -> list[str]:
    ordered = rows if draw in ("dim", "task", "transfer") else sorted(rows, key=_order)
    return list(dict.fromkeys(_category(row, draw) for row in ordered))


def _over_categories(axis: Axes, rows: Rows, draw: str) -> None:
    places = {name: i for i, name in enumerate(_categories(rows, draw))}
    style = "o-" if draw == "learned" else "o"
    for color, (name, own) in zip(COLORS, _groups(rows, draw).items(), strict=False):
        if draw == "transfer":
            name = "one part learned"
        own = sorted(own, key=lambda row: places[_category(row, draw)])
        _points(axis, own, [places[_category(row, draw)] for row in own], name, color, style)
    axis.set_xticks(range(len(places)), list(places))
    axis.set_xlabel({"dim": "learned along", "task": "task"}.get(draw, "learned"), size=9)
    _accuracy_axis(axis)


def _ensembles(axis: Axes, rows: Rows) -> None:
    members = [row | {"mean": row["member"], "spread": None, "paper": row["paper_member"]} for row in rows]
    names = _categories(rows, "learned")
    for color, name, own in zip(COLORS, ("mean member", "ensemble"), (members, rows), strict=False):
        _points(axis, own, [names.index(_word(row)) for row in own], name, color, "o")
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("learned by each member", size=9)
    _accuracy_axis(axis)


def _over_weights(axis: Axes, rows: Rows) -> None:
    rows = [row for row in rows if row["learned_weights"]]
    for color, (name, own) in zip(COLORS, _groups(rows, "weights").items(), strict=False):
        own = sorted(own, key=lambda row: row["learned_weights"])
        _points(axis, own, [math.log10(row["learned_weights"]) for row in own], name, color, "o-")
    axis.set_xlabel("log10 of the number of learned weights", size=9)
    _accuracy_axis(axis)


def _points(axis: Axes, rows: Rows, xs: list[float], name: str, color: str, style: str) -> None:
    done = [(x, row) for x, row in zip(xs, rows, strict=True) if row["mean"] is not None]
    axis.errorbar(
        [x for x, _ in done], [row["mean"] for _, row in done], yerr=[row["spread"] or 0 for _, row in done],
        fmt=style, color=color, markersize=5, capsize=3, label=name,
    )  # fmt: skip
    marks = [(x, row["paper"]["accuracy"]) for x, row in zip(xs, rows, strict=True) if row["paper"]]
    if marks:
        axis.plot(
            [x for x, _ in marks], [y for _, y in marks], "D", color=color, markerfacecolor="none", markersize=9,
            label=f"{name}, paper",
        )  # fmt: skip


def _accuracy_axis(axis: Axes) -> None:
    axis.set_ylabel("test accuracy, %", size=9)
    _finish(axis)


def _magnitudes(axis: Axes, rows: Rows) -> None:
    rows = sorted((row for row in rows if row.get("magnitudes")), key=_order)
    for kind, color in zip(("learned", "fixed"), COLORS, strict=False):
        own = [(i, row["magnitudes"][kind]) for i, row in enumerate(rows) if row["magnitudes"][kind] is not None]
        axis.plot([i for i, _ in own], [y for _, y in own], "o-", color=color, label=f"{kind} weights")
    axis.set_xticks(range(len(rows)), [_word(row) for row in rows])
    axis.set_ylabel("root mean square of a filter, mean over filters", size=9)
    _finish(axis)


def _costs(axis: Axes, rows: Rows, draw: str) -> None:
    """Time of a step relative to plain nn.Conv2d; bytes of gradients and optimizer relative to the most of them."""
    draw = draw if draw in ("bn", "dim") else "learned"
    names = _categories(rows, draw)
    groups = _groups(rows, draw)
    for i, (color, (name, own)) in enumerate(zip(COLORS, groups.items(), strict=False)):
        width = 0.8 / len(groups)
        xs = [names.index(_category(row, draw)) + (i - (len(groups) - 1) / 2) * width for row in own]
        axis.bar(xs, [row["step_ratio"] for row in own], width, color=color, label=f"step time, {name}")
        most = max(row["training_bytes"] for row in rows)
        axis.plot(xs, [row["training_bytes"] / most for row in own], "_", color="black", markersize=14)
    axis.plot([], [], "_", color="black", label="gradients + optimizer, of the most")
    axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(names)), names)
    axis.set_title("training step relative to plain nn.Conv2d", size=10)
    _finish(axis)


def _finish(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)

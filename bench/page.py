"""The report as one page of Markdown: the answer first, then where it loses, then every number."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.competitors import FROZEN, FROZEN_PLAIN, LEAN, OURS, Row, rivals
from bench.group import PLAIN, PLAIN_GRADIENTS, WHOLE, Ratio
from bench.results import Entry, Results, Source, groups

PART = 0.1
"""The learned part that the answer is about."""
LISTED = 12
CELLS = (
    "± reaches to the farther end of the 95 % interval; (in parentheses) where that holds 1: neither was shown to be "
    "faster."
)
MORE_MEMORY = 1.02
"""Keeping more than this share of what nn.Conv2d keeps is a loss."""


def page(results: Results) -> str:
    """The whole report."""
    sections = [
        _answer(results), _losses(results), _steps(results), _ceiling(results), _run(results), _layers(results),
        _kernels(results), _calls(results), _scaling(results), _memory(results), _method(results),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _answer(results: Results) -> str:
    title = f"# Benchmarks: {results.machine['device']}{_threads(results)}"
    steps = [_Step.of(rows) for _, rows in groups(results.level("step"))]
    at_part = [step for step in steps if step.ours(PART)]
    if not at_part:
        return f"{title}\n\n{_answer_of_layers(results)}"
    ours = [step.time(f"{OURS} p = {PART}") for step in at_part]
    ceiling = [step.time(FROZEN) for step in at_part]
    lines = [
        f"**With {PART:.0%} of each layer's filters learned, a training step takes {_range(ours)} of `{PLAIN}`'s time"
        + (f" ({statistics.median(ours):.2f} in the median of {len(ours)} networks)" if len(ours) > 1 else "")
        + f";** with nothing learned at all, which is the ceiling, it takes {_range(ceiling)}."
    ]
    lean = f"{LEAN} p = {PART}"
    leaner = [share for step in at_part if (share := step.kept_share(lean))]
    if leaner:
        times = [step.time(lean) for step in at_part if lean in step.rows]
        lines.append(
            f"**With `lean=True` it keeps {_range(leaner)} of the bytes for backward**, and takes {_range(times)} of "
            "the time."
        )
    trained = [share for step in at_part if (share := step.share("training_bytes", f"{OURS} p = {PART}"))]
    if trained:
        lines.append(f"Gradients and optimizer state need {_range(trained)} of the memory.")
    others = [step.time(best) for step in at_part if (best := step.best_other(PART))]
    if others:
        lines.append(f"The fastest other way to learn as much takes {_range(others)}.")
    lines.append(_standing(results))
    header = ["training step", f"{PLAIN}", *(f"p = {p}" for p in _parts(steps)), "ceiling (p = 0)"]
    header += [f"fastest other way, p = {PART}", f"kept for backward, p = {PART}, lean"]
    rows = [[step.subject, seconds(step.rows[PLAIN].median)] for step in steps]
    for row, step in zip(rows, steps, strict=True):
        row += [step.cell(f"{OURS} p = {p}") for p in _parts(steps)]
        best, kept = step.best_other(PART), step.kept_share(f"{LEAN} p = {PART}")
        row += [
            step.cell(FROZEN),
            f"{step.cell(best)}, {Row.of(best).way}" if best else "",
            f"{kept:.2f}" if kept else "",
        ]
    note = f"Time, and bytes kept, relative to `{PLAIN}`'s; less is better. {CELLS}"
    return "\n\n".join([title, " ".join(lines), note, _markdown([header, *rows])])


def _answer_of_layers(results: Results) -> str:
    """Where no training step was measured."""
    found = [e for e in results.level("layer") if e.contender == OURS and e.case.get("p") == PART]
    if not found:
        return _standing(results)
    ours = [entry.ratios[PLAIN].median for entry in found]
    return (
        f"**With {PART:.0%} of its filters learned, forward and backward of a layer take {_range(ours)} of "
        f"`nn.Conv2d`'s time.** Training steps were not measured. {_standing(results)}"
    )


class _Step(NamedTuple):
    """The contenders of a network by name."""

    subject: str
    rows: dict[str, Entry]

    @classmethod
    def of(cls, rows: Sequence[Entry]) -> _Step:
        return cls(rows[0].subject, {row.contender: row for row in rows})

    def ours(self, part: float) -> Entry | None:
        return self.rows.get(f"{OURS} p = {part}")

    def time(self, name: str) -> float:
        """Relative to nn.Conv2d's; NaN where it was not measured."""
        return self.rows[name].ratios[PLAIN].median if name in self.rows else float("nan")

    def cell(self, name: str) -> str:
        return _cell(self.rows.get(name))

    def share(self, fact: str, name: str) -> float | None:
        values = [self.rows[n].facts.get(fact) if n in self.rows else None for n in (name, PLAIN)]
        return values[0] / values[1] if all(values) else None

    def kept_share(self, name: str) -> float | None:
        return self.share("kept_bytes", name)

    def best_other(self, part: float) -> str | None:
        """The fastest of those who do the same, but for nn.Conv2d."""
        name = f"{OURS} p = {part}"
        others = [other for other in rivals(name, self.rows) if other != PLAIN] if name in self.rows else []
        return min(others, key=self.time, default=None)


def _parts(steps: Iterable[_Step]) -> list[float]:
    names = {name for step in steps for name in step.rows if name.startswith(f"{OURS} p = ")}
    return sorted(float(name.partition(" p = ")[2]) for name in names)


class Loss(NamedTuple):
    """A comparison that we lose beyond the interval."""

    entry: Entry
    rival: str
    ratio: Ratio


LEVELS = ("step", "run", "layer", "kernel", "scaling", "call")


def losses(results: Results) -> list[Loss]:
    """By level, of each the worst first."""
    found = [Loss(e, rival, r) for e in results.entries for rival, r in e.rivals.items() if r.low > 1]
    return sorted(found, key=lambda loss: (LEVELS.index(loss.entry.level), -loss.ratio.median))


def _hungry(results: Results) -> list[tuple[Entry, float]]:
    """Ours that keep more for backward than nn.Conv2d."""
    found = []
    for _, rows in groups(results.entries):
        plain = next((row.kept_bytes for row in rows if row.contender == PLAIN), None)
        for row in rows:
            if plain and OURS in row.contender and (row.kept_bytes or 0) > MORE_MEMORY * plain:
                found.append((row, (row.kept_bytes or 0) / plain))
    return found


class Standing(NamedTuple):
    """How many comparisons of ours with others came out how; undecided where the 95 % interval holds 1."""

    faster: int
    slower: int
    undecided: int


def standing(entries: Iterable[Entry]) -> Standing:
    """Of all comparisons of these entries with who does the same in another way."""
    found = [ratio for entry in entries for ratio in entry.rivals.values()]
    faster, slower = sum(ratio.high < 1 for ratio in found), sum(ratio.low > 1 for ratio in found)
    return Standing(faster, slower, len(found) - faster - slower)


def _standing(results: Results) -> str:
    found = standing(results.entries)
    if not sum(found):
        return ""
    return (
        f"Of {sum(found)} comparisons with others it is faster in {found.faster}, slower in {found.slower} and "
        f"undecided in {found.undecided}, whose 95 % interval holds 1: [where it loses](#where-it-loses)."
    )


def _losses(results: Results) -> str:
    levels = [(level, standing(results.level(level))) for level in LEVELS]
    counts = [[level, *map(str, found)] for level, found in levels if sum(found)]
    if not counts:
        return ""
    parts = ["## Where it loses", "Comparisons with other ways to do the same, by the 95 % interval of the ratio:"]
    parts.append(_markdown([["", "faster", "slower", "undecided"], *counts]))
    lost, hungry = losses(results), _hungry(results)
    if not (lost or hungry):
        return "\n\n".join([*parts, "It loses nowhere in these tables, beyond the interval."])
    header = ["level", "case", "contender, and what it is slower than", "time"]
    rows = [[e.level, ", ".join(e.group[1:]), f"{e.contender}, {rival}", interval(r)] for e, rival, r in lost]
    parts += ["Slower:", _markdown([header, *rows[:LISTED]], words=3)] if rows else []
    if rows[LISTED:]:
        parts.append(_details(f"{len(rows) - LISTED} more", _markdown([header, *rows[LISTED:]], words=3)))
    parts += [
        f"* {', '.join(e.group)}: {e.contender} keeps {share:.2f} of {PLAIN}'s bytes for backward"
        for e, share in hungry
    ]
    return "\n\n".join(parts)


def _steps(results: Results) -> str:
    text = "Forward, backward and the optimizer's step."
    return _level(results, "step", "Training steps", "steps.png", text)


def _ceiling(results: Results) -> str:
    text = f"How fast a step is, of the speed of the one that learns no filter (`{FROZEN}`): few contenders, many "
    text += "rounds. A cost proportional to multiply-adds alone would give .98 at p = 0.05 and .95 at p = 0.1."
    return _level(results, "ceiling", "How near the ceiling", None, f"{text}\n\n{ceilings(results)}")


def ceilings(results: Results) -> str:
    """Speeds relative to the all-frozen step's with their 95 % intervals: a row for each network."""
    nets = [{e.contender: e for e in rows} for _, rows in groups(results.level("ceiling"))]
    parts = [name for name in (nets[0] if nets else ()) if name != FROZEN]
    header = ["training step, speed of the all-frozen one's", "batch", "rounds", *parts]
    rows = []
    for net in nets:
        first = net[FROZEN]
        speeds = [net[name].ratios[FROZEN] for name in parts]
        rows.append([
            first.subject, str(first.case["batch"]), str(first.facts["stats"]["rounds"]),
            *(interval(Ratio(1 / time.median, 1 / time.high, 1 / time.low)) for time in speeds),
        ])  # fmt: skip
    return _markdown([header, *rows])


def _run(results: Results) -> str:
    entries = results.level("run")
    text = "Data, training and evaluation, epoch by epoch in turns."
    reached = [
        [e.contender, f"{e.facts['learned_weights']:,}", f"{e.facts['best_accuracy']:.1f} %"]
        for e in entries
        if "best_accuracy" in e.facts
    ]
    if reached:
        text += "\n\n" + _markdown([["", "weights learned", "best test accuracy"], *reached])
    return _level(results, "run", "The demo's whole training, by epoch", None, text)


def _layers(results: Results) -> str:
    entries = results.level("layer")
    header = ["layer", "learned", f"{PLAIN}", OURS, "ceiling", "fastest other way", f"{OURS}, of the floor's speed"]
    rows = []
    for (_, subject, _), members in groups(entries):
        by_name = {e.contender: e for e in members}
        if OURS not in by_name:
            continue
        ours = by_name[OURS]
        others = [by_name[n] for n in rivals(OURS, by_name) if n != PLAIN]
        best = min(others, key=lambda e: e.ratios[PLAIN].median, default=None)
        rows.append([
            subject, ours.case.get("learned", f"p = {ours.case.get('p')}"), seconds(by_name[PLAIN].median),
            _marked(ours), _cell(by_name.get(FROZEN)), f"{_cell(best)}, {best.contender}" if best else "",
            "" if ours.floor_share is None else f"{ours.floor_share:.0%}",
        ])  # fmt: skip
    text = f"Times relative to `{PLAIN}`'s. {CELLS}\n\n{_markdown([header, *rows])}" if rows else ""
    return _level(results, "layer", "Layers, forward + backward", "layers.png", text)


def _kernels(results: Results) -> str:
    known = {entry.contender for entry in results.level("kernel")}
    compared = [name for name in PLAIN_GRADIENTS if name != WHOLE and name in known]
    header = ["layer", "learned", WHOLE, *compared, OURS, "algorithm", "of the floor's speed"]
    rows = []
    for (_, subject, _), members in groups(results.level("kernel")):
        by_name = {e.contender: e for e in members}
        if OURS not in by_name or WHOLE not in by_name:
            continue
        ours, others = by_name[OURS], [by_name.get(name) for name in compared]
        rows.append([
            subject, ours.case.get("learned", ""), seconds(by_name[WHOLE].median),
            *(_cell(other, WHOLE) for other in others),
            _marked(ours, WHOLE), ours.facts.get("algorithm", ""),
            "" if ours.floor_share is None else f"{ours.floor_share:.0%}",
        ])  # fmt: skip
    text = f"Times relative to the library's whole gradient. {CELLS}\n\n{_markdown([header, *rows])}" if rows else ""
    return _level(results, "kernel", "Weight gradients alone", None, text)


def _calls(results: Results) -> str:
    text = "An eager forward and backward of a layer so small that nothing but the call counts, relative to "
    text += f"`{PLAIN}`'s. {CELLS}"
    by_size = [{e.contender: e for e in rows} for _, rows in groups(results.level("call"))]
    names = list(dict.fromkeys(name for rows in by_size for name in rows))
    header = ["", *(next(iter(rows.values())).subject for rows in by_size)]
    rows = [[name, *(_marked(found.get(name)) for found in by_size)] for name in names]
    text += f"\n\n{_markdown([header, *rows])}"
    return _level(results, "call", "What a call costs, one thread", None, text)


def _scaling(results: Results) -> str:
    entries = results.level("scaling")
    sent = [e for e in entries if "sent_bytes" in e.facts]
    timed = [e for e in entries if PLAIN in e.ratios]
    if not entries:
        return ""
    parts = [
        "## Scaling",
        "![time, kept bytes and bytes sent](scaling.png)",
        f"One axis at a time. The dashed line is what the cost model predicts for {OURS}, divided by what it predicts "
        f"for `{PLAIN}`: forward and input gradient at this device's measured rates, and the planned weight gradient "
        "by the planner's model on a GPU, at the same rates on a CPU. It bounds nothing: the measured ratio lies above "
        "it where a call's own price counts, as in small problems, and below it where "
        f"`{PLAIN}` is farther from its rates than {OURS} is. Of kept bytes many lines coincide: one shows through "
        "the gaps of the next.",
    ]
    if sent:
        header = ["processes", "learned", "gradients MB", "sent MB", "sent by a perfect ring MB"]
        rows = [[str(e.case["processes"]), f"p = {e.case['p']}", *(f"{e.facts[key] / 1e6:.3f}" for key in SENT)]
                for e in sent]  # fmt: skip
        caption = f"What a process sends in a step under DistributedDataParallel ({sent[0].case['net']}, gloo), as its "
        parts.append(_details(caption + "sockets count it", _markdown([header, *rows])))
    if timed:
        tables = [f"#### {subject}, {case}\n\n{table(rows)}" for (_, subject, case), rows in groups(timed)]
        parts.append(_details("Every point", "\n\n".join(tables)))
    return "\n\n".join(parts)


SENT = ("gradient_bytes", "sent_bytes", "ring_bytes")


def _memory(results: Results) -> str:
    """What `python -m bench.memory` wrote: rows of named cells."""
    found = results.memory
    rows = found.get("cases") if isinstance(found, Mapping) else None
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_plain_cell(row.get(key)) for key in columns] for row in rows)]
    return f"## Memory at the sizes of the literature\n\n{found.get('text', '')}\n\n{_markdown(lines)}"


def _method(results: Results) -> str:
    machine = results.machine
    lines = [
        "## How this was measured",
        f"Python {machine['python_version']}, torch {machine['torch']}, {machine['dtype']}, channels_last, "
        f"{machine['threads']} CPU threads; the code and the device's measured rates by file of results:",
        _markdown(
            [["", "commit", "copy, GB/s", "product or convolution, GFLOP/s"], *map(_source, results.sources)], words=2
        ),
        "Contenders of a table took turns in one process, round by round, so that drift of the machine hits all alike. "
        "A ratio is the median over rounds of the ratio within a round, with its 95 % interval from order statistics: "
        "of twenty such intervals one may miss the true median, so that chance decides a few comparisons. "
        "Outputs and gradients were compared with float64 before anything was timed. What is freed stays with the "
        "process, as with the allocators that PyTorch's tuning guide advises.",
        "The floor is made of the rates above, those of the same file: each pass reads and writes each operand once or "
        "multiplies at that rate, whichever takes longer." + _beyond_the_floor(results),
        "Bytes kept for backward: of a training step what the allocator holds between forward and backward, "
        "checkpointing included; of a layer what autograd saves. Parameters do not count.",
        f"`{FROZEN}` learns no filter: the ceiling of what a faster weight gradient can reach. `{FROZEN_PLAIN}` is "
        "the same in plain PyTorch, which calls less and keeps more. LoRA learns other weights, as many. Activation "
        "checkpointing of a single layer saves nothing and memsave_torch has no part of a layer, so both are among "
        "networks only, memsave_torch where it is installed. To compile a network takes a CPU a minute: there, one "
        "network and one layer are measured compiled, unless all networks are asked for.",
    ]
    tested = [f"{', '.join(test['files'])} ({test['outcome']})" for test in results.tests]
    if tested:
        lines.append(f"Tested before: {'; '.join(dict.fromkeys(tested))}.")
    lines += [
        f"{source.left_out} cases of {source.name} are left out: there was no time for them."
        for source in results.sources
        if source.left_out
    ]
    return "\n\n".join(lines)


def _source(source: Source) -> list[str]:
    commit, rates = source.commit, source.rates or {}
    text = "not recorded" if commit is None else commit["id"][:10] + (" and changes" if commit["dirty"] else "")
    speeds = [rates.get(key) for key in ("bytes_per_second", "flops_per_second")]
    return [source.name, text, *("" if speed is None else f"{speed / 1e9:.4g}" for speed in speeds)]


def _beyond_the_floor(results: Results) -> str:
    shares = [entry.floor_share for entry in results.entries if entry.floor_share is not None]
    beyond = sum(share > 1 for share in shares)
    if not beyond:
        return ""
    return (
        f" {beyond} of {len(shares)} shares exceed 100%, the highest is {max(shares):.0%}: caches hold small operands "
        "and move them faster than the large copy that was measured, and the device's speed drifts."
    )


def _level(results: Results, level: str, title: str, picture: str | None, text: str) -> str:
    """A level's picture and summary, its tables folded; empty where nothing of it was measured."""
    entries = results.level(level)
    if not entries:
        return ""
    parts = [f"## {title}", *([f"![{title}]({picture})"] if picture else []), *([text] if text else [])]
    tables = [f"#### {subject}, {case}\n\n{table(members)}" for (_, subject, case), members in groups(entries)]
    return "\n\n".join([*parts, _details("Every contender", "\n\n".join(tables))])


def table(entries: Sequence[Entry]) -> str:
    """Contenders of one group: times, ratios with their intervals, bytes; what loses is marked."""
    others = list(entries[0].ratios)
    phases = list(entries[0].phases)
    extras = [extra for extra in EXTRAS if any(extra.of(entry) for entry in entries)]
    header = ["", "median", "IQR", *(f"time of {other}'s" for other in others), *phases]
    lines = [[*header, *(extra.title for extra in extras)]]
    for entry in entries:
        line = [entry.contender, seconds(entry.median), seconds(entry.iqr)]
        line += [interval(entry.ratios[other]) for other in others]
        line += [f"{entry.phases[phase].median:.2f}" for phase in phases]
        line += [extra.of(entry) for extra in extras]
        if loses(entry):
            line[0] = f"**{line[0]}** (loses)"
        lines.append(line)
    return _markdown(lines)


def loses(entry: Entry) -> bool:
    """Whether ours is slower, beyond the interval, than any other way to do the same."""
    return any(ratio.low > 1 for ratio in entry.rivals.values())


class _Extra(NamedTuple):
    """A column that only some tables have."""

    title: str
    of: Callable[[Entry], str]


def _megabytes(fact: str) -> Callable[[Entry], str]:
    return lambda entry: "" if entry.facts.get(fact) is None else f"{entry.facts[fact] / 1e6:.2f}"


EXTRAS = (
    _Extra("kept MB", _megabytes("kept_bytes")),
    _Extra("peak MB", _megabytes("peak_bytes")),
    _Extra("gradients + optimizer MB", _megabytes("training_bytes")),
    _Extra("of the floor's speed", lambda entry: "" if entry.floor_share is None else f"{entry.floor_share:.0%}"),
    _Extra("predicted", lambda entry: "" if entry.predicted is None else seconds(entry.predicted)),
)


def _markdown(lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table; after the first `words` columns come numbers."""
    header, *rows = lines
    ruled = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def _details(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def _threads(results: Results) -> str:
    """Of a CPU, on which float32 is measured."""
    machine = results.machine
    return f", {machine['threads']} CPU threads" if machine["dtype"] == "float32" else ""


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _cell(entry: Entry | None, reference: str = PLAIN) -> str:
    return "" if entry is None or reference not in entry.ratios else uncertain(entry.ratios[reference])


def _marked(entry: Entry | None, reference: str = PLAIN) -> str:
    cell = _cell(entry, reference)
    return f"**{cell}** (loses)" if entry is not None and loses(entry) else cell


def _plain_cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def seconds(value: float) -> str:
    """For a cell."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def uncertain(value: Ratio) -> str:
    """For a cell: the median, how far the interval reaches to its farther end, parentheses where that holds 1.

    What is compared with itself is 1.
    """
    if value.low == value.high == 1:
        return "1.00"
    reach = max(value.median - value.low, value.high - value.median)
    text = f"{value.median:.2f} ±{f'{reach:.2f}'.removeprefix('0')}"
    return f"({text})" if value.low <= 1 <= value.high else text


def interval(value: Ratio) -> str:
    return f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"

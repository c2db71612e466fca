"""One page about a folder of results: how much faster, how much leaner, against what, on what, where it loses.

python -m bench.report bench/results/cpu-2-cores               writes report.md and its pictures there
python -m bench.report NEW --against OLD                       lists what became slower, exit code 1 if anything did
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.competitors import FROZEN, OURS
from bench.group import PLAIN, PLAIN_GRADIENTS, Ratio
from bench.pictures import draw_layers, draw_scaling, draw_steps
from bench.results import Entry, Results, ResultsError, groups, load

REGRESSION = 1.05


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of results, such as bench/results/cpu-2-cores")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="older results of the same machine")
    options = parser.parse_args(arguments)
    try:
        results = load(options.folder)
        if options.against is not None:
            slower = regressions(results, load(options.against))
            print("\n".join(slower) or "nothing became slower")
            return int(bool(slower))
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, picture in (("steps.png", draw_steps), ("layers.png", draw_layers), ("scaling.png", draw_scaling)):
        picture(results, options.folder / name)
    path = options.folder / "report.md"
    path.write_text(page(results))
    print(path)
    return 0


def page(results: Results) -> str:
    """The whole report as Markdown."""
    sections = [_head(results), _losses(results)]
    for level, title, picture in (
        ("step", "Training steps", "steps.png"),
        ("run", "The demo's whole training, by epoch", None),
        ("layer", "Layers, forward + backward", "layers.png"),
        ("kernel", "Weight gradients alone", None),
        ("call", "What a call costs, one thread", None),
    ):
        entries = results.level(level)
        if entries:
            tables = [f"### {subject}, {case}\n\n{table(members)}" for (_, subject, case), members in groups(entries)]
            shown = [f"![{title}]({picture})"] if picture else []
            sections.append("\n\n".join([f"## {title}", *shown, *tables]))
    if results.level("scaling"):
        sections.append("## Scaling\n\n![time, kept bytes and all-reduced bytes](scaling.png)")
    return "\n\n".join(sections) + "\n"


def table(entries: Sequence[Entry]) -> str:
    """Contenders of one group: times, ratios with their intervals, kept bytes; what loses to PyTorch is marked."""
    others = list(entries[0].ratios)
    phases = list(entries[0].phases)
    with_kept = any(entry.kept_bytes is not None for entry in entries)
    with_floor = any(entry.floor_share is not None for entry in entries)
    header = ["", "median ms", "IQR ms", *(f"time of {other}'s" for other in others), *phases]
    header += (["kept MB"] if with_kept else []) + (["of the floor's speed"] if with_floor else [])
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for entry in entries:
        line = [entry.contender, f"{1e3 * entry.median:.3g}", f"{1e3 * entry.iqr:.2g}"]
        line += [_ratio(entry.ratios[other]) for other in others]
        line += [f"{entry.phases[phase].median:.2f}" for phase in phases]
        if with_kept:
            line.append("" if entry.kept_bytes is None else f"{entry.kept_bytes / 1e6:.2f}")
        if with_floor:
            line.append("" if entry.floor_share is None else f"{entry.floor_share:.0%}")
        if loses(entry):
            line[0] = f"**{line[0]}** (loses)"
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loses(entry: Entry) -> bool:
    """Whether ours is slower, beyond the interval, than what PyTorch does."""
    return bool(_lost_to(entry))


def _lost_to(entry: Entry) -> list[str]:
    rivals = [name for name in (PLAIN, *PLAIN_GRADIENTS) if name in entry.ratios and OURS in entry.contender]
    return [name for name in rivals if entry.ratios[name].low > 1]


def regressions(new: Results, old: Results) -> list[str]:
    """What takes more than 5 % longer than it did, relative to nn.Conv2d, beyond both intervals; one line each."""
    before = {(entry.group, entry.contender): entry for entry in old.entries}
    lines = []
    for entry in new.entries:
        earlier = before.get((entry.group, entry.contender))
        if earlier is None or PLAIN not in entry.ratios or PLAIN not in earlier.ratios:
            continue
        now, then = entry.ratios[PLAIN], earlier.ratios[PLAIN]
        if now.median > REGRESSION * then.median and now.low > then.high:
            lines.append(f"{', '.join(entry.group)}: {entry.contender} {_ratio(then)} -> {_ratio(now)} of {PLAIN}")
    return lines


def _head(results: Results) -> str:
    machine, commit = results.machine, results.commit
    rates = machine["rates"]
    return (
        f"# Benchmarks: {machine['device']}\n\n"
        f"{machine['threads']} CPU threads, Python {machine['python_version']}, torch {machine['torch']}, "
        f"{machine['dtype']}, channels_last; commit {commit['id'][:10]}{' and changes' if commit['dirty'] else ''}. "
        f"Measured here: a copy moves {rates['bytes_per_second'] / 1e9:.3g} GB/s, a matrix product computes "
        f"{rates['flops_per_second'] / 1e9:.4g} GFLOP/s; the floor of a layer is made of these two.\n\n"
        f"Contenders of a table took turns, round by round; a ratio is the median over rounds, with its 95 % interval. "
        f"Results were compared with float64 first. `{FROZEN}` is the ceiling: nothing is learned."
    )


def _losses(results: Results) -> str:
    lost = [entry for entry in results.entries if loses(entry)]
    if not lost:
        return f"## Where it loses\n\nNowhere in these tables is {OURS} slower than {PLAIN} beyond the interval."
    lines = [
        f"* {', '.join(e.group)}: {e.contender} takes {_ratio(e.ratios[name])} of {name}'s time"
        for e in lost
        for name in _lost_to(e)
    ]
    return "\n".join(["## Where it loses\n", *lines])


def _ratio(value: Ratio) -> str:
    return f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"


if __name__ == "__main__":
    sys.exit(main())

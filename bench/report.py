"""One page about a folder of results: how much faster, how much leaner, against what, on what, where it loses.

python -m bench.report bench/results/cpu-2-cores               writes report.md and its pictures there
python -m bench.report NEW --against OLD                       lists what became slower or keeps more, exit code 1 if
                                                               anything did
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.competitors import FROZEN, OURS
from bench.group import Ratio
from bench.page import page
from bench.pictures import draw_layers, draw_scaling, draw_steps
from bench.results import Entry, Results, ResultsError, load

REGRESSION = 1.05


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of results, such as bench/results/cpu-2-cores")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="older results of the same machine")
    options = parser.parse_args(arguments)
    try:
        results = load(options.folder)
        if options.against is not None:
            old = load(options.against)
            found = regressions(results, old)
            print("\n".join([*found, *notes(results, old)]) or "nothing became slower or keeps more")
            return int(bool(found))
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, picture in (("steps.png", draw_steps), ("layers.png", draw_layers), ("scaling.png", draw_scaling)):
        picture(results, options.folder / name)
    path = options.folder / "report.md"
    path.write_text(page(results))
    print(path)
    return 0


def regressions(new: Results, old: Results) -> list[str]:
    """What of ours takes or keeps more than 5 % more than it did; one line each.

    Time is that relative to PyTorch's in the same rounds, and counts where it is beyond both intervals.
    """
    lines = []
    for entry, earlier in _pairs(new, old):
        for reference in list(entry.ratios)[:1]:
            now, then = entry.ratios[reference], earlier.ratios.get(reference)
            if then is not None and now.median > REGRESSION * then.median and now.low > then.high:
                lines.append(f"{_name(entry)} {_ratio(then)} -> {_ratio(now)} of {reference}'s time")
        kept, before = entry.kept_bytes, earlier.kept_bytes
        if kept is not None and before is not None and kept > REGRESSION * before:
            lines.append(f"{_name(entry)} keeps {before / 1e6:.2f} -> {kept / 1e6:.2f} MB for backward")
    return lines


def notes(new: Results, old: Results) -> list[str]:
    """What makes a comparison worth less."""
    found = []
    for fact in ("device", "threads", "torch", "dtype"):
        now, then = new.machine.get(fact), old.machine.get(fact)
        if now != then:
            found.append(f"note: {fact} was {then}, is {now}")
    compared, ours = sum(1 for _ in _pairs(new, old)), [entry for entry in old.entries if _is_ours(entry)]
    if compared < len(ours):
        found.append(f"note: {len(ours) - compared} of {len(ours)} earlier measurements have no counterpart")
    return found


def _pairs(new: Results, old: Results) -> list[tuple[Entry, Entry]]:
    before = {(entry.group, entry.contender): entry for entry in old.entries}
    ours = [entry for entry in new.entries if _is_ours(entry)]
    return [(e, before[e.group, e.contender]) for e in ours if (e.group, e.contender) in before]


def _is_ours(entry: Entry) -> bool:
    return OURS in entry.contender or FROZEN in entry.contender


def _name(entry: Entry) -> str:
    return f"{', '.join(entry.group)}: {entry.contender}"


def _ratio(value: Ratio) -> str:
    return f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"


if __name__ == "__main__":
    sys.exit(main())

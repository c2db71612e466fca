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
from typing import Any

from bench.competitors import FROZEN, OURS
from bench.group import Ratio
from bench.page import interval, page
from bench.pictures import draw
from bench.results import Entry, Results, ResultsError, load

REGRESSION = 1.05
# Of the machine; where they differ, so may times.
FACTS = (
    "device", "instructions", "threads", "torch", "dtype", "onednn", "cuda", "cudnn", "driver", "triton"
)  # fmt: skip


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
            print("\n".join([*(found or ["nothing became slower or keeps more"]), *notes(results, old)]))
            return int(bool(found))
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(results, options.folder)
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
        for reference, then, now in _times(entry, earlier):
            if _slower(then, now):
                lines.append(f"{_name(entry)} {interval(then)} -> {interval(now)} of {reference}'s time")
        for fact, words in BYTES.items():
            before, after = earlier.facts.get(fact), entry.facts.get(fact)
            if before is not None and after is not None and after > REGRESSION * before:
                lines.append(f"{_name(entry)} {words.format(f'{before / 1e6:.2f} -> {after / 1e6:.2f} MB')}")
    for case, (then, now) in _memory_pairs(new, old).items():
        for measure in ("process", "allocator"):
            if now[measure] > REGRESSION * then[measure]:
                lines.append(f"memory, {case}: {then[measure]:.3f} -> {now[measure]:.3f} of plain's, by the {measure}")
    return lines


BYTES = {
    "kept_bytes": "keeps {} for backward", "peak_bytes": "needs {} at the peak",
    "training_bytes": "needs {} for gradients and optimizer",
}  # fmt: skip


def notes(new: Results, old: Results) -> list[str]:
    """What makes a comparison worth less."""
    found = []
    for fact in FACTS:
        now, then = new.machine.get(fact), old.machine.get(fact)
        if now != then:
            found.append(f"note: {fact} was {then}, is {now}")
    compared = len(_pairs(new, old)) + len(_memory_pairs(new, old))
    earlier = len([entry for entry in old.entries if _is_ours(entry)]) + len(_memory_cases(old))
    if compared < earlier:
        found.append(f"note: {earlier - compared} of {earlier} earlier measurements have no counterpart")
    times = [(then, now) for pair in _pairs(new, old) for _, then, now in _times(*pair)]
    blind = sum(not _slower(then, now) and _undecidable(then, now) for then, now in times)
    if blind:
        found.append(f"note: {blind} of {len(times)} times vary too much to show 5 % more")
    return found


def _times(entry: Entry, earlier: Entry) -> list[tuple[str, Ratio, Ratio]]:
    """What time is relative to, then and now."""
    return [(other, earlier.ratios[other], entry.ratios[other]) for other in list(entry.ratios)[:1]
            if other in earlier.ratios]  # fmt: skip


def _slower(then: Ratio, now: Ratio) -> bool:
    return now.median > REGRESSION * then.median and now.low > then.high


def _undecidable(then: Ratio, now: Ratio) -> bool:
    """Whether the intervals are so wide that they would still meet if it took 5 % more."""
    return REGRESSION * now.low / now.median <= then.high / then.median


def _pairs(new: Results, old: Results) -> list[tuple[Entry, Entry]]:
    before = {(entry.group, entry.contender): entry for entry in old.entries}
    ours = [entry for entry in new.entries if _is_ours(entry)]
    return [(e, before[e.group, e.contender]) for e in ours if (e.group, e.contender) in before]


def _memory_pairs(new: Results, old: Results) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What `python -m bench.memory` found then and now, by case."""
    then, now = _memory_cases(old), _memory_cases(new)
    return {case: (then[case], now[case]) for case in then if case in now}


def _memory_cases(results: Results) -> dict[str, dict[str, Any]]:
    return {} if results.memory is None else {row["case"]: row for row in results.memory["cases"]}


def _is_ours(entry: Entry) -> bool:
    return OURS in entry.contender or FROZEN in entry.contender


def _name(entry: Entry) -> str:
    return f"{', '.join(entry.group)}: {entry.contender}"


if __name__ == "__main__":
    sys.exit(main())

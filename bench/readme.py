"""The README's tables and pictures, from the committed results: `python -m bench.readme`; `--check` only compares.

A block `<!-- results: NAME -->` ... `<!-- end -->` of the README is replaced by what BLOCKS makes of the results. A
picture carries the fingerprint of the results that it shows and of the code that drew it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.competitors import OURS
from bench.group import PLAIN
from bench.page import CELLS, ceilings, interval, page, seconds, uncertain
from bench.pictures import draw, outdated
from bench.results import Entry, Results, groups, load
from rwn_ext.paper import demo, drawing

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "cpu-2-cores"
NARROW = RESULTS.with_name("cpu-2-cores-avx2")
"""How near the ceiling is on a processor without AVX-512; measured earlier."""
AGAIN = f"{PLAIN} again"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if anything differs")
    results = load(RESULTS)
    if parser.parse_args(arguments).check:
        old = [path.name for path, text in texts(results).items() if not path.exists() or path.read_text() != text]
        old += outdated(results, RESULTS)
        print("\n".join(f"{name} is not what the results say; run python -m bench.readme" for name in old))
        return int(bool(old))
    for path, text in texts(results).items():
        path.write_text(text)
    draw(results, RESULTS)
    return 0


def texts(results: Results) -> dict[Path, str]:
    """What is written, but for the pictures: the README, the report, the pages of the paper's figures."""
    figures = {RESULTS / "paper" / name / "figure.md": drawing.page(shown) for name, shown in results.paper.items()}
    return {README: filled(README.read_text(), results), RESULTS / "report.md": page(results), **figures}


def filled(text: str, results: Results) -> str:
    """The README with its blocks made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{BLOCKS[match[2]](results).strip()}\n\n{match[3]}"

    return re.sub(r"(<!-- results: (\w+) -->).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def _ceilings(results: Results) -> str:
    """On both processors."""
    narrow = load(NARROW)
    commit = narrow.sources[0].commit or {"id": "not recorded"}
    return (
        f"With AVX-512:\n\n{ceilings(results)}\n\n"
        f"On another processor, with AVX2 (commit {commit['id'][:10]}):\n\n{ceilings(narrow)}"
    )


def _demo(results: Results) -> str:
    assert results.demo is not None
    return demo.markdown(results.demo)


def _steps(results: Results) -> str:
    """Ratios to nn.Conv2d's time: a row for each contender, a column for each network."""
    entries = results.level("step")
    columns = {subject: {e.contender: e for e in rows} for (_, subject, _), rows in groups(entries)}
    contenders = list(dict.fromkeys(entry.contender for entry in entries))
    lines = [["training step, time of `nn.Conv2d`'s", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(_cell(rows.get(name)) for rows in columns.values())] for name in contenders]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_caption(results, entries)}"


def _caption(results: Results, entries: Sequence[Entry]) -> str:
    """How to read the cells, and what was measured on what."""
    machine, rounds = results.machine, [entry.facts["stats"]["rounds"] for entry in entries]
    text = f"Medians over {min(rounds)} to {max(rounds)} rounds. {CELLS} "
    if any(entry.contender == AGAIN for entry in entries):
        text += f"`{AGAIN}` is the same network once more, so what it shows is noise. "
    return text + f"{machine['dtype']}, channels_last, {machine['threads']} CPU threads, torch {machine['torch']}."


def _calls(results: Results) -> str:
    """What the smallest layers cost, as an item of the list of what is not done yet."""
    ours = [entry for entry in results.level("call") if entry.contender == OURS]
    cases = ", ".join(f"{interval(entry.ratios[PLAIN])} ({entry.subject})" for entry in ours)
    return (
        f"* A call has its price: forward and backward of a layer so small that nothing else counts take {cases} of "
        f"`{PLAIN}`'s time (median and 95 % interval). Networks of many small layers feel "
        f"it: see MobileNetV2 in the [report]({(RESULTS / 'report.md').relative_to(ROOT)})."
    )


def _memory(results: Results) -> str:
    """Our targets and what was reached; then each case that others have published."""
    assert results.memory is not None
    parts, rule = [results.memory["text"]], ["---", *["---:"] * 3]
    ours, theirs = ([row for row in results.memory["cases"] if bool(row["source"]) == other] for other in (False, True))
    lines = [["bytes of plain nn's", "target", "by the process", "by the allocator"], rule, *map(_shares, ours)]
    parts += ["\n".join(f"| {' | '.join(line)} |" for line in lines)] if ours else []
    lines = [["likewise", "published", "by the process", "by the allocator"], rule, *map(_shares, theirs)]
    parts += ["\n".join(f"| {' | '.join(line)} |" for line in lines)] if theirs else []
    sources = ", ".join(dict.fromkeys(row["source"] for row in theirs))
    return "\n\n".join([*parts, *([f"Published: {sources}."] if theirs else [])])


def _shares(row: dict[str, Any]) -> list[str]:
    return [row["case"], f"{row['target']:.2f}", f"{row['process']:.3f}", f"{row['allocator']:.3f}"]


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    return seconds(entry.median) if entry.contender == PLAIN else uncertain(entry.ratios[PLAIN])


BLOCKS: dict[str, Callable[[Results], str]] = {
    "demo": _demo, "steps": _steps, "ceiling": _ceilings, "memory": _memory, "calls": _calls,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())

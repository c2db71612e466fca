"""The README's tables and pictures, from the committed results: `python -m bench.readme`; `--check` only compares.

A block `<!-- results: NAME -->` ... `<!-- end -->` of the README is replaced by what BLOCKS makes of the results. A
picture carries the fingerprint of the results it was drawn from.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bench.group import PLAIN
from bench.page import ceilings, page
from bench.pictures import FINGERPRINT, draw_demo, draw_layers, draw_scaling, draw_steps
from bench.results import Entry, Results, groups, load
from rwn_ext.paper import demo

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "cpu-2-cores"
PICTURES = {"demo.png": draw_demo, "steps.png": draw_steps, "layers.png": draw_layers, "scaling.png": draw_scaling}


def pictured(results: Results) -> dict[str, Callable[[Results, Path], None]]:
    """The pictures of which there are results."""
    levels = {"step": "steps.png", "layer": "layers.png", "scaling": "scaling.png"}
    names = [name for level, name in levels.items() if results.level(level)]
    return {name: PICTURES[name] for name in [*(["demo.png"] if results.demo else []), *names]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if anything differs")
    results, text = load(RESULTS), README.read_text()
    if parser.parse_args(arguments).check:
        old = [] if filled(text, results) == text else [README.name]
        report = RESULTS / "report.md"
        old += [] if report.exists() and report.read_text() == page(results) else [report.name]
        old += [name for name in pictured(results) if fingerprint(RESULTS / name) != results.fingerprint]
        print("\n".join(f"{name} is not what the results say; run python -m bench.readme" for name in old))
        return int(bool(old))
    README.write_text(filled(text, results))
    for name, draw in pictured(results).items():
        draw(results, RESULTS / name)
    (RESULTS / "report.md").write_text(page(results))
    return 0


def filled(text: str, results: Results) -> str:
    """The README with its blocks made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{BLOCKS[match[2]](results).strip()}\n\n{match[3]}"

    return re.sub(r"(<!-- results: (\w+) -->).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def fingerprint(picture: Path) -> str | None:
    """Of the results that the picture was drawn from."""
    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get(FINGERPRINT)


def _demo(results: Results) -> str:
    assert results.demo is not None
    return demo.markdown(results.demo)


def _steps(results: Results) -> str:
    """Medians of the ratios to nn.Conv2d: a row for each contender, a column for each network."""
    columns = {subject: {e.contender: e for e in rows} for (_, subject, _), rows in groups(results.level("step"))}
    contenders = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    lines = [["training step, time of `nn.Conv2d`'s", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(_cell(rows.get(name)) for rows in columns.values())] for name in contenders]
    machine = results.machine
    caption = f"{machine['dtype']}, channels_last, {machine['threads']} CPU threads, torch {machine['torch']}"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption}"


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
    return "" if entry is None else f"{entry.ratios[PLAIN].median:.2f}"


BLOCKS: dict[str, Callable[[Results], str]] = {
    "demo": _demo, "steps": _steps, "ceiling": ceilings, "memory": _memory,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())

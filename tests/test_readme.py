"""The README's lists of what works and what does not: each line is marked on a test, each mark is a line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def listed(heading: str) -> list[str]:
    """The lines of the list below this heading."""
    section = (ROOT / "README.md").read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    return [line.removeprefix("* ") for line in section.splitlines() if line.startswith("* ")]


def marked(marker: str) -> list[str]:
    """The texts of all `@pytest.mark.<marker>("...")` on tests."""
    texts = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"pytest.mark.{marker}":
                    (text,) = decorator.args
                    assert node.name.lower().startswith("test"), f"{path.name}: {node.name} is no test"
                    texts.append(ast.literal_eval(text))
    return texts


@pytest.mark.parametrize(("heading", "marker"), [("Works with", "works_with"), ("Does not", "does_not")])
def test_lists_are_what_is_tested(heading: str, marker: str):
    assert len(listed(heading)) >= 10
    assert sorted(listed(heading)) == sorted(marked(marker))

"""Statements that say one thing at a time: at most one comprehension each."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def crowded_lines(source: str) -> list[int]:
    """Where statements with more than one comprehension begin, generator expressions among them;
    those of statements inside a statement are theirs.
    """
    counts: Counter[int] = Counter()

    def visit(node: ast.AST, line: int) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                visit(child, child.lineno)
            else:
                counts[line] += isinstance(child, COMPREHENSIONS)
                visit(child, line)

    visit(ast.parse(source), 0)
    return sorted(line for line, count in counts.items() if count > 1)


def sources() -> Iterator[Path]:
    """Every Python file, once: `polar_fx/passes` is a link to `passes`."""
    for top in ("polar_fx", "passes", "bench", "tests"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if "polar_fx/passes" not in path.as_posix():
                yield path


def test_statements_have_at_most_one_comprehension() -> None:
    crowded: list[str] = []
    for path in sources():
        lines = crowded_lines(path.read_text(encoding="utf-8"))
        crowded += (f"{path.relative_to(ROOT).as_posix()}:{line}" for line in lines)
    assert not crowded, (
        f"{', '.join(crowded)}: name one of the values, or give it a function or a loop"
    )


def test_crowded_statements_are_seen() -> None:
    """The test above would pass if it saw nothing."""
    source = (
        "one = [a for a in b for c in a]\n"
        "two = [[c for c in a] for a in b]\n"
        "apart = {a for a in b}, sum(a for a in b)\n"
        "def f(x=[a for a in b]):\n"
        "    return {a: a for a in b}\n"
        "if any(a for a in b):\n"
        "    g(a for a in b)\n"
        "for a in [c for c in b]:\n"
        "    text = f'{[c for c in a]} {[c for c in a]}'\n"
        "with g(a for a in b), g(a for a in b):\n"
        "    pass\n"
        "inside = lambda: [f(c for c in a) for a in b]\n"
    )
    assert crowded_lines(source) == [2, 3, 9, 10, 12]
    assert Path(__file__) in sources()

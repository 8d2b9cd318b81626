"""Built-in tasks: one seed gives the same rows, splits never overlap, answers are right; levels
follow fail rates.
"""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from places import ROOT
from polar_fx.errors import InputError
from polar_fx.questions import (
    TASKS,
    cell_sample,
    generate,
    get_task,
    levels,
    split_of,
    with_difficulty,
)

task_names = st.sampled_from(sorted(TASKS))


def _ids(task: str, n: int, *, seed: int = 0, **options: Any) -> list[str]:
    return [q.id for q in generate(task, n, seed, **options)]


GOLDEN = {
    "addition": (
        "bf8c23635052d4d0",
        [
            ("addition:6+5", "6 + 5", "11"),
            ("addition:75+3", "75 + 3", "78"),
            ("addition:41+79", "41 + 79", "120"),
        ],
    ),
    "comparison": (
        "239afebfb7006811",
        [
            ("comparison:4,2", "max(4, 2)", "4"),
            ("comparison:9,1,5", "max(9, 1, 5)", "9"),
            ("comparison:50,72", "max(50, 72)", "72"),
        ],
    ),
    "division": (
        "967a3500c83d8008",
        [
            ("division:36/4", "36 / 4", "9"),
            ("division:54/18", "54 / 18", "3"),
            ("division:612/6", "612 / 6", "102"),
        ],
    ),
    "multiplication": (
        "9e9cc25875b9fd40",
        [
            ("multiplication:7x5", "7 * 5", "35"),
            ("multiplication:38x9", "38 * 9", "342"),
            ("multiplication:254x7", "254 * 7", "1778"),
        ],
    ),
    "sequences": (
        "5163f546c5f85441",
        [
            (
                "sequences:13,10,12,13,10,12,13",
                "Which number comes next: 13, 10, 12, 13, 10, 12, 13",
                "10",
            ),
            ("sequences:34,43,52,61,70", "Which number comes next: 34, 43, 52, 61, 70", "79"),
            (
                "sequences:94,109,124,139,154",
                "Which number comes next: 94, 109, 124, 139, 154",
                "169",
            ),
        ],
    ),
    "subtraction": (
        "1cc6d081349bac08",
        [
            ("subtraction:9-8", "9 - 8", "1"),
            ("subtraction:44-8", "44 - 8", "36"),
            ("subtraction:99-68", "99 - 68", "31"),
        ],
    ),
    "word-problems": (
        "90b80d959bcaf975",
        [
            (
                "word-problems:more:22,35",
                "Lily has 22 stickers. Jack gives Lily 35 more stickers. How many stickers does "
                "Lily have now?",
                "57",
            ),
            (
                "word-problems:more-fewer:7,24,25",
                "A bus carries 7 people. At a stop 24 people get on and 25 get off. How many "
                "people are on the bus?",
                "6",
            ),
            (
                "word-problems:two-groups-fewer:3,7,6,4",
                "Ben buys 3 packs of 7 shells, gets 6 more from Omar and loses 4. How many shells "
                "does Ben have?",
                "23",
            ),
        ],
    ),
}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_golden_rows(task: str) -> None:
    """Published results name these rows: they must not change, also not between versions of
    Python.
    """
    digest, first = GOLDEN[task]
    rows = generate(task, 200, seed=2024)
    assert [(q.id, q.question, q.answers[0]) for q in rows[:3]] == first
    text = "\n".join("\t".join((q.id, q.question, *q.answers, q.cell)) for q in rows)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@settings(max_examples=25, deadline=None)
@given(task_names, st.integers(), st.integers(1, 60), st.integers(1, 60))
def test_fewer_rows_are_the_first_of_more(task: str, seed: int, n: int, more: int) -> None:
    rows = generate(task, n + more, seed)
    assert generate(task, n, seed) == rows[:n]
    assert len({q.id for q in rows}) == n + more
    assert len({q.question for q in rows}) == n + more
    counts = Counter(q.cell for q in rows)
    assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == min(
        len(rows), len(TASKS[task].cells)
    )


@settings(max_examples=25, deadline=None)
@given(
    task_names,
    st.integers(),
    st.integers(),
    st.sampled_from(["train", "validation", "test"]),
    st.data(),
)
def test_a_question_is_in_one_split_whatever_the_seed(
    task: str, a: int, b: int, split: Any, data: st.DataObject
) -> None:
    cells = data.draw(
        st.lists(st.sampled_from([c.name for c in TASKS[task].cells]), min_size=1, unique=True)
    )
    # small cells hold fewer
    rows = [q for cell in cells for q in cell_sample(task, cell, n=8, seed=a, split=split)]
    rows += generate(task, 8, a, split=split)
    assert {split_of(q.id) for q in rows} == {split}
    assert {q.cell for q in rows} >= set(cells)
    known = {q.id: q for q in generate(task, 200, b)}
    assert all(known.get(q.id, q) == q for q in rows)  # one id, one question


def test_a_cells_rows_do_not_depend_on_the_other_cells() -> None:
    alone = generate("multiplication", 5, 3, cells=["2x1 digits"])
    among = [q for q in generate("multiplication", 20, 3) if q.cell == "2x1 digits"]
    assert alone == among


def test_any_text_has_a_split() -> None:
    assert split_of("half a pair \ud800") in ("train", "validation", "test")


def test_shares_of_the_splits() -> None:
    counts = Counter(split_of(f"question {i}") for i in range(20_000))
    assert (
        abs(counts["train"] - 12_000) < 300
        and abs(counts["validation"] - 3_000) < 250
        and abs(counts["test"] - 5_000) < 250
    )


@given(st.integers(0, 999), st.integers(0, 999))
def test_mirrored_questions_share_a_split(a: int, b: int) -> None:
    assert split_of(f"multiplication:{a}x{b}") == split_of(f"multiplication:{b}x{a}")


def test_splits_are_pinned() -> None:
    """A change here would move test questions into everyone's training data."""
    ids = [
        "addition:12+7",
        "multiplication:7x8",
        "word-problems:more:7,6",
        "svamp-chal-1",
        "gsm8k/é",
        "",
    ]
    assert [split_of(i) for i in ids] == ["train", "train", "train", "train", "train", "test"]


@pytest.mark.parametrize("sign", ["+", "-", "*", "/"])
def test_arithmetic_is_right(sign: str) -> None:
    task = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}[sign]
    for q in generate(task, 800, 5):
        a, b = (int(part) for part in q.question.split(f" {sign} "))
        assert int(q.answers[0]) == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] >= 0
        assert re.sub(r"\D", " ", q.cell).split() == [str(len(str(a))), str(len(str(b)))]


def test_comparisons_are_right() -> None:
    places: Counter[tuple[str, int]] = Counter()
    for q in generate("comparison", 1500, 5):
        numbers = [int(n) for n in re.findall(r"\d+", q.question)]
        assert int(q.answers[0]) == max(numbers) and len(set(numbers)) == len(numbers)
        assert (
            q.cell
            == f"{len(numbers)} of {len(str(numbers[0]))} digit{'s' if numbers[0] > 9 else ''}"
        )
        places[q.cell, numbers.index(max(numbers))] += 1
    for cell in TASKS["comparison"].cells:  # the place of the largest tells nothing
        counts = [count for (of, _), count in places.items() if of == cell.name]
        assert len(counts) == int(cell.name[0]) and max(counts) < 2 * min(counts)


def test_sequences_are_right() -> None:
    """The next term, found again from the terms shown."""
    for q in generate("sequences", 1000, 5):
        terms = [int(t) for t in q.question.partition(": ")[2].split(", ")]
        steps = [b - a for a, b in pairwise(terms)]
        growth = [b - a for a, b in pairwise(steps)]
        expected = {
            "repeating": terms[-3],
            "multiplied": terms[-1] * (terms[1] // terms[0]),
            "growing step": terms[-1] + steps[-1] + growth[0],
        }.get(q.cell, terms[-1] + steps[0])
        assert q.answers == (str(expected),) and expected >= 0
        assert len(set(steps)) == 1 or q.cell in ("repeating", "multiplied", "growing step")


STORIES = {
    "more": "a + b",
    "fewer": "a - b",
    "groups": "a * b",
    "share": "a / b",
    "more-fewer": "a + b - c",
    "groups-more": "a * b + c",
    "groups-fewer": "a * b - c",
    "add-share": "(a + b) / c",
    "two-groups-fewer": "a * b + c - d",
    "costs": "a * b + c * d",
    "change": "d - a * (b + c)",
    "left-share": "(a + b - c) / d",
}


def test_word_problems_are_right() -> None:
    wordings: dict[str, set[str]] = {}
    for q in generate("word-problems", 1500, 5):
        _, kind, numbers = q.id.split(":")
        values = dict(zip("abcd", map(int, numbers.split(",")), strict=False))
        assert Counter(re.findall(r"\d+", q.question)) == Counter(map(str, values.values()))
        assert int(q.answers[0]) == eval(STORIES[kind], values) >= 0
        operations = len(re.findall(r"[-+*/]", STORIES[kind]))
        assert (
            q.cell.startswith(str(operations))
            and "{" not in q.question
            and q.question.endswith("?")
        )
        wordings.setdefault(kind, set()).add(re.sub(r"[A-Z][a-z]+|\d+", "", q.question))
    assert wordings.keys() == STORIES.keys() and all(len(w) >= 2 for w in wordings.values())


def test_two_people_of_a_story_differ() -> None:
    for q in generate("word-problems", 600, 9, cells=["1 step"]):
        names = re.findall(
            r"\b(?:Mia|Tom|Ava|Ben|Lily|Sam|Nora|Leo|Ruth|Omar|Ines|Jack)\b", q.question
        )
        if "and" in q.question and "How many more" in q.question:
            assert len(set(names)) == 2


@settings(max_examples=20, deadline=None)
@given(task_names, st.integers())
def test_examples_of_prompts_are_never_asked(task: str, seed: int) -> None:
    shown = {e.question for e in TASKS[task].examples}
    assert shown and shown.isdisjoint(q.question for q in generate(task, 400, seed))


def test_all_rows_of_a_cell_can_be_had_and_no_more() -> None:
    assert sorted(_ids("multiplication", 62, cells=["1x1 digits"])) == sorted(
        _ids("multiplication", 62, seed=8, cells=["1x1 digits"])
    )
    message = (
        "63 questions asked of multiplication with the cells 1x1 digits, but 62 exist; ask "
        "for fewer, or add cells"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        generate("multiplication", 63, cells=["1x1 digits"])
    with pytest.raises(
        InputError,
        match=r"of multiplication with the cells 1x1 digits, but \d+ exist in the test split; ask",
    ):
        generate("multiplication", 62, cells=["1x1 digits"], split="test")


def test_a_dry_cell_leaves_its_rows_to_the_others() -> None:
    counts = Counter(q.cell for q in generate("multiplication", 400))
    assert counts["1x1 digits"] == 62 and max(counts.values()) - counts["2x1 digits"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "roots"},
            "unknown task 'roots'; use one of addition, subtraction, multiplication, word",
        ),
        (
            {"cells": ["9+9 digits"]},
            "unknown cell '9+9 digits' of addition; use some of 1+1 digits, 2+1 digits",
        ),
        ({"cells": []}, "no cells of addition were named; use some of 1+1 digits"),
        ({"n": 0}, "n is 0; ask for a whole number of questions, at least 1"),
        ({"n": True}, "n is True"),
        ({"n": 2.0}, "n is 2.0"),
        ({"seed": "7"}, "seed is '7'; give a whole number"),
        (
            {"split": "dev"},
            "unknown split 'dev'; use one of train, validation, test, or None for all",
        ),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        generate(**{"task": "addition", "n": 3, **options})


def test_one_cell_may_be_named_without_a_list() -> None:
    assert _ids("addition", 3, cells="1+1 digits") == _ids("addition", 3, cells=["1+1 digits"])
    assert get_task("addition").cells[0].name == "1+1 digits"


@pytest.mark.child_process
def test_tasks_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, polar_fx.questions.tasks, polar_fx.questions; print({'torch', "
        "'transformers', 'sympy'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.stdout.strip() == "set()", result.stderr


# difficulty


def test_levels_are_bins_of_the_fail_rate() -> None:
    right = {
        "a": (100, 100),
        "b": (80, 100),
        "c": (79, 100),
        "d": (60, 100),
        "e": (40, 100),
        "f": (20, 100),
        "g": (19, 100),
        "h": (0, 7),
    }
    assert levels(right) == {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "f": 4, "g": 5, "h": 5}


@given(st.integers(1, 500), st.data())
def test_a_cell_with_more_right_is_not_harder(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    level = levels({"x": (right, n)})["x"]
    assert 1 <= level <= 5 and (right == n or levels({"x": (right + 1, n)})["x"] <= level)


@pytest.mark.parametrize("counts", [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts(counts: tuple[int, int]) -> None:
    with pytest.raises(
        InputError, match=f"cell 'x' has {counts[0]} right answers of {counts[1]}; measure"
    ):
        levels({"x": counts})


def test_questions_get_the_level_of_their_cell() -> None:
    rows = generate("addition", 4, cells=["1+1 digits", "3+3 digits"])
    found = with_difficulty(rows, {"1+1 digits": 1, "3+3 digits": 5})
    assert [q.difficulty for q in found] == [1, 5, 1, 5]
    for question, row in zip(found, rows, strict=True):
        assert question.id == row.id
    with pytest.raises(
        InputError,
        match=(
            r"is of the cell '3\+3 digits', which has no level; measure it "
            r"too.*known: '1\+1 digits'"
        ),
    ):
        with_difficulty(rows, {"1+1 digits": 1})

"""Choosing by several criteria in turn, worked out by hand."""

from collections.abc import Callable

import numpy as np

from polar_fx.program import Program
from polar_fx.questions import Question
from polar_fx.training.mining import edits_as_programs, in_turn, mine
from polar_fx.training.verdict_table import VerdictTable


def fixed(*names: int | None) -> Callable[[list[int]], int | None]:
    left = iter(names)
    return lambda chosen: next(left, None)


def test_each_criterion_names_one_a_round() -> None:
    assert in_turn([fixed(1, 2, 3), fixed(7, 8)], 9, rounds=3) == [1, 7, 2, 8, 3]
    assert in_turn([fixed(1, 2, 3), fixed(7, 8)], 9, rounds=1) == [1, 7]
    assert in_turn([fixed(1, 2, 3), fixed(7, 8)], 3, rounds=3) == [1, 7, 2]
    assert in_turn([fixed(1)], 0, rounds=3) == []


def test_what_is_chosen_already_costs_a_turn() -> None:
    """The second criterion's first name is taken, so its next one waits for the next round."""
    assert in_turn([fixed(1, 2), fixed(1, 9)], 9, rounds=2) == [1, 2, 9]
    assert in_turn([fixed(5, None, 6)], 9, rounds=3, first=(5, 0)) == [5, 0, 6]


def test_a_criterion_knows_what_is_chosen() -> None:
    seen: list[list[int]] = []

    def more(chosen: list[int]) -> int | None:
        seen.append(chosen)
        return len(chosen) if len(chosen) < 3 else None

    assert in_turn([more], 9, rounds=4, first=(0,)) == [0, 1, 2]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2]]


def test_a_mined_menu_by_hand() -> None:
    """Four questions of one kind. A skip adds the two that the identity gets wrong; what repeats it
    adds nothing, and comes neither by coverage nor by accuracy, nor within a budget.
    """
    programs = tuple(Program.parse(p, 4) for p in ("identity", "skip 1", "skip 2", "0 (1-3)*2"))
    right = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]], dtype=bool)
    questions = tuple(Question(str(i), "task", "?", ("!",)) for i in range(4))
    table = VerdictTable(questions, programs, right, np.full((4, 4), np.nan))
    assert mine(table, 4)[:2] == [programs[0], programs[1]]
    assert programs[3] not in mine(table, 4) and mine(table, 1) == [programs[0]]


def test_edits_are_programs_that_keep_the_trunk() -> None:
    found = edits_as_programs(4, 2)
    assert [str(p) for p in found[:2]] == ["0-1 3 /4", "0-2 /4"]
    assert all(p.path[:2] == (0, 1) and p.num_steps > 2 for p in found)
    assert len(set(found)) == len(found) == len({str(p) for p in found})

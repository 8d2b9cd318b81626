"""From records to a predictor, in a world where the right program is known."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from polar_fx.errors import InputError, ProgramError
from polar_fx.predictor.features import Features
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, Question
from polar_fx.runtime.trunk import shares_trunk
from polar_fx.search.records.records import SearchRecord
from polar_fx.stats.risk import least_questions
from polar_fx.training.pipeline import (
    TrainingConfig,
    mine_menu,
    too_few_to_certify,
    train_predictor,
)
from polar_fx.training.selector_training import (
    SelectorConfig,
)
from polar_fx.training.verdict_table import Rows, VerdictTable
from training_samples import DEPTH, IDENTITY, A, B, C, question, record

CONFIG = TrainingConfig(
    Features(1, 8),
    4,
    num_candidates=40,
    num_edits=30,
    num_variations=4,
    screen_questions=20,
    num_finalists=8,
    final_questions=40,
    budgets=(0.9,),
    selector=SelectorConfig(width=8, epochs=80, learning_rate=0.02),
)


def number(q: Question) -> int:
    return int(q.id[1:])


def right(q: Question, p: Program) -> bool:
    return p == (A if number(q) % 2 else B)


def rows(first: int, count: int) -> list[tuple[Question, EncodedQuestion]]:
    made = [question(f"q{i}") for i in range(first, first + count)]
    return [(q, EncodedQuestion(q.id, (1,), (2,), ((3,),))) for q in made]


class World:
    """Judges questions: A answers those of odd numbers and B those of even ones; and remembers what
    it was asked.
    """

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self.drawn: list[list[Question]] = []

    def dense(self, name: str, part: Rows, programs: Sequence[Program]) -> VerdictTable:
        self.asked[name] = len(part) * len(programs)
        self.drawn.append([q for q, _ in part])
        listed = [p for p in programs if p != IDENTITY]
        records: list[SearchRecord] = []
        for q, _ in part:
            verdicts = {p: right(q, p) for p in listed}
            records.append(record(q.id, right(q, IDENTITY), right=verdicts))
        return VerdictTable.of(records)


def features_of(part: Rows) -> torch.Tensor:
    return torch.tensor([[float(number(q) % 2), 1.0] for q, _ in part])


def given(world: World) -> dict[str, Any]:
    return {
        "dense": world.dense,
        "features_of": features_of,
        "depth": DEPTH,
        "config": CONFIG,
    }


SEARCHED = [record(f"q{i}", False, right={A: bool(i % 2), C: False}) for i in range(1000, 1010)]


def test_from_records_to_a_predictor() -> None:
    world = World()
    selector, results = train_predictor(
        SEARCHED, rows(0, 200), validation=rows(500, 100), **given(world)
    )
    assert {A, B} <= set(selector.menu.programs) and len(selector.menu) <= 4
    measured = results["validation"]
    assert measured["accuracy"]["accuracy"] == 1.0
    assert abs(measured["best_static_of_train"]["accuracy"] - 0.5) < 0.1
    assert set(world.asked) == {"screen", "variations", "finalists", "train", "validation"}
    assert results["questions"]["screened"] == 60 and results["finalists"] == 9
    assert world.asked["finalists"] == 40 * 8
    screened = {q.id for q in world.drawn[0]}
    assert screened.isdisjoint(q.id for q in world.drawn[2]), (
        "the best are tried on other questions"
    )


def test_a_menu_is_mined_from_questions_of_every_task() -> None:
    world = World()
    with_tasks = [(replace(q, task=f"t{i // 50}"), e) for i, (q, e) in enumerate(rows(0, 200))]
    screened = mine_menu([], with_tasks, dense=world.dense, depth=DEPTH, config=CONFIG)
    assert len({q.task for q in world.drawn[-1]}) == 4, "wherever they stand"
    assert screened.programs[0] == IDENTITY and all(shares_trunk(p, 1) for p in screened.programs)
    with pytest.raises(InputError, match="no program to screen"):
        mine_menu(
            [], with_tasks, dense=world.dense, depth=DEPTH, config=replace(CONFIG, num_edits=0)
        )


def test_without_validation_questions_nothing_is_trained() -> None:
    with pytest.raises(InputError, match="0 validation questions"):
        train_predictor(SEARCHED, rows(0, 200), validation=[], **given(World()))


def test_programs_may_be_given_instead_of_mined() -> None:
    world = World()
    selector, results = train_predictor(
        [], rows(0, 40), validation=rows(100, 20), **given(world), programs=[A, B]
    )
    assert selector.menu.programs == (IDENTITY, A, B)
    assert set(world.asked) == {"train", "validation"}
    assert results["questions"]["screened"] == results["finalists"] == 0
    off_trunk = Program.parse("skip 0", DEPTH)
    with pytest.raises(ProgramError, match="does not begin with layers 0"):
        train_predictor([], rows(0, 4), validation=rows(9, 4), **given(world), programs=[off_trunk])


def test_too_few_questions_to_certify_are_said() -> None:
    assert too_few_to_certify(["a"] * 1148, TrainingConfig()) == ""
    told = too_few_to_certify(["a"] * 1147, TrainingConfig())
    assert "1147 validation questions are too few" in told and "takes 1148 even if" in told
    assert too_few_to_certify(["a", "b"], TrainingConfig(risk=0)) == "", "no risk: by gains alone"


def test_each_of_several_tasks_needs_enough_questions_to_certify() -> None:
    config = TrainingConfig()
    one = 2 * least_questions(config.risk, config.delta, starts=4)
    of_two = 2 * least_questions(config.risk, config.delta / 2, starts=4)
    assert one < of_two, "tasks share the confidence"
    assert too_few_to_certify(["a", "b"] * of_two, config) == ""
    told = too_few_to_certify(["a"] * of_two + ["b"] * one, config)
    assert told.startswith(f"validation questions of b ({one}) are too few")
    assert f"takes {of_two} of each task even if" in told

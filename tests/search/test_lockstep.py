"""Many searches at once: lockstep, budgets, rewards, verification."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from polar_fx.errors import InputError
from polar_fx.judge.verdict import REWARDS, Verdict, get_reward
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, Question
from polar_fx.search.config import SearchConfig
from polar_fx.search.lockstep import run_searches
from polar_fx.search.methods.registry import METHODS
from polar_fx.search.records.records import SearchRecord

DEPTH = 8
ROWS = [
    (
        Question(f"q{i}", "toy", f"question {i}", ("1",)),
        EncodedQuestion(f"q{i}", (), (i + 1,), ((1,),)),
    )
    for i in range(7)
]


class Toy:
    """Right where a question's layer is skipped; counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, Program]]] = []
        self.forgotten: list[str] = []

    def evaluate(self, pairs: Sequence[tuple[EncodedQuestion, Program]]) -> list[Verdict]:
        self.calls.append([(q.id, p) for q, p in pairs])
        return [
            Verdict(
                q.prompt[0] % DEPTH not in p.path,
                -float(p.num_steps),
                float(DEPTH / 2 - p.num_steps),
            )
            for q, p in pairs
        ]

    def forget(self, question_ids: Iterable[str]) -> None:
        self.forgotten += question_ids


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_searches_every_question_within_its_budget(method: str) -> None:
    toy = Toy()
    config = SearchConfig(method=method, simulations=40)
    records = list(run_searches(iter(ROWS), toy, DEPTH, config, in_flight=3))
    ids = [question.id for question, _ in ROWS]
    assert sorted(record.question.id for record in records) == ids
    assert sorted(toy.forgotten) == ids
    asked = [pair for call in toy.calls for pair in call]
    assert len(set(asked)) == len(asked), "a program is judged once for a question"
    at_once: list[int] = []
    for call in toy.calls:
        at_once.append(len({name for name, _ in call}))
    assert max(at_once) == 3, "three at a time"
    for record in records:
        assert 10 <= len(record.explored) <= 40
        assert not record.baseline.correct
        assert record.seconds is not None and record.seconds >= 0
        for each in record.explored:
            assert each.reward == float(each.verdict.correct)
            assert (each.program in record.valid) == each.verdict.correct
    if method not in ("random", "scan"):  # which look at programs without regard to rewards
        assert all(r.is_rescued for r in records)


def test_what_runs_beside_a_search_does_not_change_it() -> None:
    config = SearchConfig(simulations=30)
    alone = {
        r.question.id: r.explored for row in ROWS for r in run_searches([row], Toy(), DEPTH, config)
    }
    for in_flight in (1, 4, 50):
        together = {
            r.question.id: r.explored
            for r in run_searches(ROWS, Toy(), DEPTH, config, in_flight=in_flight)
        }
        assert together == alone
    other = {
        r.question.id: r.explored
        for r in run_searches(ROWS, Toy(), DEPTH, SearchConfig(simulations=30, seed=1))
    }
    assert other != alone


def programs_of(record: SearchRecord) -> tuple[Program, ...]:
    return tuple(each.program for each in record.explored)


def test_questions_have_seeds_of_their_own() -> None:
    records = list(run_searches(ROWS, Toy(), DEPTH, SearchConfig(method="random", simulations=30)))
    assert len({r.seed for r in records}) == len(ROWS)
    assert len(set(map(programs_of, records))) == len(ROWS), "a shared seed would fake a menu"


@pytest.mark.parametrize("reward", sorted(REWARDS))
def test_rewards_are_what_the_search_is_told(reward: str) -> None:
    (record,) = run_searches(ROWS[:1], Toy(), DEPTH, SearchConfig(reward=reward, simulations=20))
    for each in record.explored:
        assert each.reward == get_reward(reward)(each.verdict)
        assert 0 <= each.reward <= 1


def test_valid_programs_are_verified_by_themselves() -> None:
    verifier = Toy()
    records = list(
        run_searches(ROWS[:2], Toy(), DEPTH, SearchConfig(simulations=30), verifier=verifier)
    )
    for record in records:
        assert tuple(record.verified) == record.valid and record.valid
    assert len(verifier.calls) == 2 and len(verifier.forgotten) == 2


def test_the_questions_may_be_a_queue_that_is_read_late() -> None:
    read: list[str] = []

    def rows() -> Iterable[tuple[Question, EncodedQuestion]]:
        for row in ROWS:
            read.append(row[0].id)
            yield row

    found = run_searches(rows(), Toy(), DEPTH, SearchConfig(simulations=5), in_flight=2)
    next(found)
    assert len(read) < len(ROWS)


@pytest.mark.parametrize("reward", ["likelihood", "margin"])
def test_rewards_that_generation_cannot_give(reward: str) -> None:
    with pytest.raises(InputError, match=f"the reward {reward!r} needs teacher-forced verdicts"):
        get_reward(reward)(Verdict(True))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        InputError, match="unknown reward 'luck'; use one of exact, likelihood, margin"
    ):
        list(run_searches(ROWS, Toy(), DEPTH, SearchConfig(reward="luck")))
    with pytest.raises(InputError, match="unknown search method 'luck'"):
        list(run_searches(ROWS, Toy(), DEPTH, SearchConfig(method="luck")))


@pytest.mark.parametrize(
    "name, value",
    [
        ("simulations", 0),
        ("simulations", 1.5),
        ("seed", True),
        ("random_child", 1.5),
        ("exploration", -1),
        ("max_steps_ratio", 0.5),
    ],
)
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        SearchConfig(**{name: value})


def test_rewards_of_extreme_verdicts_stay_in_range() -> None:
    for verdict in (
        Verdict(False, -1e6, -1e6),
        Verdict(True, 0.0, 1e6),
        Verdict(False, math.nan, math.nan),
    ):
        assert all(0 <= reward(verdict) <= 1 for reward in REWARDS.values())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_programs_that_the_model_does_not_run_are_not_judged(method: str) -> None:
    def runs(program: Program) -> bool:
        return 3 in program.path

    config = SearchConfig(method=method, simulations=40)
    judged: list[set[Program]] = []
    for allowed in (None, runs):
        toy = Toy()
        records = list(run_searches(iter(ROWS[:3]), toy, DEPTH, config, runs=allowed))
        judged.append({program for call in toy.calls for _, program in call})
        found = {each.program for record in records for each in record.explored}
        assert found == judged[-1] - {Program.identity(DEPTH)}
    assert not all(map(runs, judged[0])), "else nothing was left out"
    assert len(judged[1]) > 10 and all(map(runs, judged[1]))

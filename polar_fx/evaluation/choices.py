"""What each method runs on each question, decided before any answer is graded.

Shape legend: N questions, K programs of a menu.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..predictor.menu import Menu, Proposal
from ..predictor.policy import Policy
from ..predictor.selector import Selector
from ..program import Program
from ..questions.question import Question, places_of
from ..search.records.records import SearchRecord
from ..stats.arms import ArmResult
from ..training.selector_training import choose_all

# Names of methods that others are told apart from or compared with; the identity's is `IDENTITY`.
SELECTOR_ACCURACY = "selector: accuracy"
ANY_OF_MENU = "any program of the menu"  # by the answer key
POLAR_NETWORK, FIRST_OF_BEAM = "PoLar network", ", first of beam"
SELECTOR_LIKELIEST = "selector: likeliest"
SELECTOR_PRICED = "selector: mean steps <= "  # and the fraction
BEST_STATIC = "best static program"

_STEPS = 0.9  # budget of the selector's choice by steps
_PASS_AT = (3, 5)


@dataclass(frozen=True, eq=False)
class Choice:
    """A method: the programs it runs on each of N questions, one each unless it needs the answer
    key to tell which is right.

    With several, the question counts as answered if any of them is right, all of them count as
    executed, and it is an `oracle`.
    """

    name: str
    programs: tuple[tuple[Program, ...], ...]
    oracle: bool = False

    @classmethod
    def single(cls, name: str, programs: Sequence[Program]) -> "Choice":
        return cls(name, tuple((p,) for p in programs))

    def at(self, places: Sequence[int]) -> "Choice":
        """The method on some of the questions."""
        return Choice(self.name, tuple(self.programs[i] for i in places), self.oracle)

    def that_run(self, runs: Callable[[Program], bool]) -> "Choice":
        """With the identity in place of programs that the model does not run."""

        def run(program: Program) -> Program:
            return program if runs(program) else Program.identity(program.depth)

        programs = (tuple(dict.fromkeys(map(run, each))) for each in self.programs)
        return Choice(self.name, tuple(programs), self.oracle)

    def __post_init__(self) -> None:
        if not self.oracle and any(len(each) != 1 for each in self.programs):
            raise InputError(
                f"method {self.name!r} runs several programs on a question: only an oracle can "
                "choose among them"
            )


def by_policy(
    name: str, selector: Selector, *, policy: Policy, proposals: Sequence[Proposal]
) -> Choice:
    """A selector's choices under a policy, of its proposals for N questions."""
    menu, calibration = selector.menu, selector.calibration
    policy.check(calibration, None)
    if policy.kind not in ("accuracy", "mean_steps", "steps"):
        raise InputError(
            f"policy {policy} is not compared here; use accuracy, steps<= or mean_steps<="
        )
    chosen = [policy.choose(proposal, calibration) for proposal in proposals]
    return Choice.single(name, [menu.programs[k] for k in chosen])


def likeliest(name: str, menu: Menu, *, chances: np.ndarray) -> Choice:
    """The likeliest program of each question, whatever the threshold."""
    return Choice.single(
        name,
        [
            menu.programs[k]
            for k in choose_all(chances, menu.steps, depth=menu.depth, threshold=-np.inf)
        ],
    )


def selector_choices(selector: Selector, proposals: Sequence[Proposal]) -> list[Choice]:
    """A selector's choices by every policy that is compared, of its proposals for N questions, and
    what the answer key would choose among its programs.
    """
    chances = np.stack([proposal.probabilities for proposal in proposals])
    menu, prices = selector.menu, selector.calibration.prices
    policies = {SELECTOR_ACCURACY: Policy("accuracy")}
    policies |= {f"{SELECTOR_PRICED}{f:g}": Policy("mean_steps", f) for f in prices}
    policies[f"selector: steps <= {_STEPS:g}"] = Policy("steps", _STEPS)
    choices = [
        by_policy(name, selector, policy=each, proposals=proposals)
        for name, each in policies.items()
    ]
    choices.insert(1, likeliest(SELECTOR_LIKELIEST, menu, chances=chances))
    choices.append(oracle(ANY_OF_MENU, menu, n=len(chances)))
    return choices + [top_k(f"selector: pass@{k}", menu, chances=chances, k=k) for k in _PASS_AT]


def static(name: str, program: Program, *, n: int) -> Choice:
    """One program for all questions."""
    return Choice.single(name, [program] * n)


def static_by_task(
    name: str, programs: Mapping[str, Program], *, questions: Sequence[Question]
) -> Choice:
    """One program a task, which has to be told which task a question is of; the identity for
    unknown ones.
    """
    depth = next(iter(programs.values())).depth
    return Choice.single(name, [programs.get(q.task, Program.identity(depth)) for q in questions])


def random_skips(
    name: str,
    depth: int,
    *,
    num_steps: int,
    trunk: int,
    n: int,
    seed: int,
    runs: Callable[[Program], bool] = lambda program: True,
) -> Choice:
    """For each question a random program of `num_steps` steps: layers after the trunk are left out
    at random, and drawn again where the model does not run what is left (`runs`).
    """
    rng = random.Random(seed)
    found: list[Program] = []
    while len(found) < n:
        skipped = set(rng.sample(range(trunk, depth), depth - num_steps))
        program = Program.from_path([i for i in range(depth) if i not in skipped], depth)
        if runs(program):
            found.append(program)
    return Choice.single(name, found)


def oracle(name: str, menu: Menu, *, n: int) -> Choice:
    """Whether any program of the menu is right: what no selector among them can beat."""
    return Choice(name, tuple(menu.programs for _ in range(n)), True)


def top_k(name: str, menu: Menu, *, chances: np.ndarray, k: int) -> Choice:
    """The k likeliest programs of each question, judged by the answer key (pass@k)."""
    programs: list[tuple[Program, ...]] = []
    for row in np.argsort(-chances, axis=1, kind="stable")[:, :k]:
        programs.append(tuple(menu.programs[j] for j in row))
    return Choice(name, tuple(programs), True)


def wanted_programs(
    choices: Sequence[Choice], questions: Sequence[Question]
) -> dict[str, tuple[Program, ...]]:
    """All programs that any method runs on each question, by its id, without the identity, which
    always runs.
    """
    found: dict[str, dict[Program, None]] = {q.id: {} for q in questions}
    for choice in choices:
        if len(choice.programs) != len(questions):
            raise InputError(
                f"method {choice.name!r} has programs for {len(choice.programs)} questions, not "
                f"{len(questions)}"
            )
        for question, programs in zip(questions, choice.programs, strict=True):
            found[question.id] |= dict.fromkeys(p for p in programs if not p.is_identity)
    return {name: tuple(programs) for name, programs in found.items()}


def arm_results(
    choices: Sequence[Choice], records: Sequence[SearchRecord], *, unseen: Collection[str] = ()
) -> list[ArmResult]:
    """A result a method and task, from records of all that the methods run, in the order of their
    questions.

    `unseen` are tasks the predictor was not trained on. Raises InputError if a record lacks a
    program.
    """
    members = places_of([r.question.task for r in records])
    arms: list[ArmResult] = []
    for choice in choices:
        for places in members.values():
            of_task = [records[i] for i in places]
            arms.append(_arm(choice.at(places), of_task, unseen=unseen))
    return arms


def _arm(choice: Choice, records: Sequence[SearchRecord], *, unseen: Collection[str]) -> ArmResult:
    """Of a method on the questions of these records, which are of one task."""
    task = records[0].question.task
    right, steps, unique = [], [], []
    for record, ran in zip(records, choice.programs, strict=True):
        verdicts = record.verdicts
        if missing := [p for p in ran if p not in verdicts]:
            raise InputError(
                f"question {record.question.id!r} has no verdict of {missing[0]} of "
                f"{choice.name!r}; judge all that its methods run (`wanted_programs`)"
            )
        right.append(any(verdicts[p].correct for p in ran))
        steps.append(float(sum(p.num_steps for p in ran)))
        unique.append(float(np.mean([p.num_unique_layers for p in ran])))
    return ArmResult(
        choice.name,
        task,
        np.array(right),
        np.array([r.baseline.correct for r in records]),
        np.array(steps),
        np.full(len(right), float(records[0].depth)),
        unique_layers=np.array(unique),
        oracle=choice.oracle,
        unseen=task in unseen,
    )

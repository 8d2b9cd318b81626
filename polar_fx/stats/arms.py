"""Arms, which are methods on the questions of a task: their results, pooled, and all of them
compared with the identity.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np

from ..errors import InputError
from .paired import RESAMPLES, Paired, compare, flags, holm, step_counts, strata_codes

IDENTITY = "identity"  # name of the arm the others are compared with
OVERALL = "overall"  # task name of all tasks pooled
# of the tasks the predictor was trained on, and of others
SEEN, UNSEEN = "in distribution", "out of distribution"


@dataclass(frozen=True, slots=True, eq=False)
class ArmResult:
    """A method on the n questions of a task, beside the identity on the same ones; arrays are [n],
    copied and frozen.

    right, identity_right: booleans; steps, identity_steps: executed steps (one number stands for
    all questions);
    unique_layers: distinct layers run; format_valid: whether an answer could be read;
    generated_tokens: how many.
    `oracle`: chosen by the answer key. `unseen`: the predictor was not trained on the task.
    `strata`: the task of each question of a pooled result. Raises InputError.
    """

    name: str
    task: str
    right: np.ndarray
    identity_right: np.ndarray
    steps: np.ndarray
    identity_steps: np.ndarray
    unique_layers: np.ndarray | None = None
    format_valid: np.ndarray | None = None
    generated_tokens: np.ndarray | None = None
    oracle: bool = False
    unseen: bool = False
    strata: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not (
            isinstance(self.name, str) and isinstance(self.task, str) and self.name and self.task
        ):
            raise InputError(f"an arm named {self.name!r} on task {self.task!r}; give two texts")
        for field in ("oracle", "unseen"):
            if not isinstance(value := getattr(self, field), bool):
                raise InputError(
                    f"{self.name} on {self.task}: {field} is {value!r}; give True or False"
                )
        where = f"{self.name} on {self.task}: "
        n = len(flags(where + "right", self.right))
        for field in ("right", "identity_right", "format_valid"):
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, flags(where + field, value, n=n))
        for field in ("steps", "identity_steps", "unique_layers", "generated_tokens"):
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, step_counts(where + field, value, n=n))
        if self.strata is not None:
            strata_codes(self.strata, n)
            object.__setattr__(self, "strata", tuple(self.strata))

    @property
    def n(self) -> int:
        return len(self.right)

    def paired(self, *, seed: int = 0, resamples: int = RESAMPLES) -> Paired:
        """`compare` of this arm."""
        extra = {"strata": self.strata, "seed": seed, "resamples": resamples}
        return compare(
            self.right,
            self.identity_right,
            steps=self.steps,
            identity_steps=self.identity_steps,
            **extra,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `from_dict`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {
            name: value.tolist() for name, value in values.items() if isinstance(value, np.ndarray)
        }
        return {
            "n": self.n,
            **values,
            **lists,
            "strata": None if self.strata is None else list(self.strata),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ArmResult":
        """Raises InputError for missing or unknown fields, or an n that is not the number of
        answers.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known - {"n"}):
            raise InputError(
                f"unknown fields of an arm: {', '.join(unknown)}; known are "
                f"{', '.join(sorted(known))}"
            )
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := sorted(needed - set(values)):
            raise InputError(f"an arm lacks {', '.join(missing)}; give what `to_dict` wrote")
        arm = cls(**{name: value for name, value in values.items() if name != "n"})
        if values.get("n", arm.n) != arm.n:
            raise InputError(
                f"{arm.name} on {arm.task} says n = {values['n']} and has {arm.n} answers; give "
                "them all"
            )
        return arm


@dataclass(frozen=True, slots=True, eq=False)
class ArmComparison:
    """An arm, what `compare` says of it, and Holm's p among the arms of its task; None for identity
    and oracles.
    """

    arm: ArmResult
    paired: Paired
    adjusted_p: float | None

    @property
    def label(self) -> str:
        """The arm's name, marked where the answer key chose."""
        return f"{self.arm.name} (oracle)" if self.arm.oracle else self.arm.name

    @property
    def task_label(self) -> str:
        """The arm's task, marked where the predictor was not trained on it."""
        return (
            f"{self.arm.task} ({UNSEEN})"
            if self.arm.unseen and self.arm.task != UNSEEN
            else self.arm.task
        )


def pool(results: Sequence[ArmResult], task: str = OVERALL) -> ArmResult:
    """One arm over the questions of several tasks, which become its strata.

    Values that not all tasks have are left out.
    """
    if len({(each.name, each.oracle) for each in results}) != 1:
        raise InputError(
            f"pooled arms are {sorted({each.name for each in results})}; give results of one arm"
        )

    def join(field: str) -> Any:
        parts = [getattr(each, field) for each in results]
        return None if any(part is None for part in parts) else np.concatenate(parts)

    optional = {
        field: join(field) for field in ("unique_layers", "format_valid", "generated_tokens")
    }
    strata = tuple(each.task for each in results for _ in range(each.n))
    needed = [join(field) for field in ("right", "identity_right", "steps", "identity_steps")]
    same = {"oracle": results[0].oracle, "unseen": all(each.unseen for each in results)}
    return ArmResult(results[0].name, task, *needed, **optional, **same, strata=strata)


def pooled_names(results: Iterable[ArmResult]) -> dict[str, list[str]]:
    """Which tasks are taken together, by the name of that: those the predictor was trained on apart
    from the others.

    Tasks that are alone of their kind are not pooled. Raises InputError where a task has such a
    name.
    """
    unseen = {each.task: each.unseen for each in results}
    seen = OVERALL if not any(unseen.values()) else SEEN
    found: dict[str, list[str]] = {seen: [], UNSEEN: []}
    for task, is_unseen in unseen.items():
        found[UNSEEN if is_unseen else seen].append(task)
    found = {name: tasks for name, tasks in found.items() if len(tasks) > 1}
    if taken := sorted(unseen.keys() & found.keys()):
        raise InputError(
            f"a task is named {taken[0]}, as several of them together are; give it another name"
        )
    return found


def compare_arms(
    results: Iterable[ArmResult], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[ArmComparison]:
    """Every arm and task, in the order given; first, where there are several tasks, the overall of
    each arm that ran them all.

    Where the predictor was not trained on some of them, those are pooled apart (`pooled_names`).
    Holm's correction is over the arms of one task, or of the overall, without the identity and
    oracles, which are no candidates. Raises InputError where arms of a task did not run on the same
    questions, or one is there twice.
    """
    results = list(results)
    by_task: dict[str, list[ArmResult]] = {}
    found: dict[tuple[str, str], ArmResult] = {}
    for each in results:
        of_task = by_task.setdefault(each.task, [])
        of_task.append(each)
        same = of_task[0]
        if not all(
            np.array_equal(getattr(each, side), getattr(same, side))
            for side in ("identity_right", "identity_steps")
        ):
            raise InputError(
                f"{each.name} and {same.name} on {each.task} differ in the identity; run both on "
                "the same questions"
            )
        if (each.task, each.name) in found:
            raise InputError(
                f"two results of {each.name} on {each.task}; give each arm once a task"
            )
        found[each.task, each.name] = each
    names = dict.fromkeys(each.name for each in results)
    groups: list[list[ArmResult]] = []
    for label, tasks in pooled_names(results).items():
        together: list[ArmResult] = []
        for name in names:
            parts = [found[task, name] for task in tasks if (task, name) in found]
            if len(parts) == len(tasks):
                together.append(pool(parts, label))
        groups.append(together)
    groups += by_task.values()
    rows: list[ArmComparison] = []
    for group in groups:
        paired = [each.paired(seed=seed, resamples=resamples) for each in group]
        candidates = [
            i for i, each in enumerate(group) if each.name != IDENTITY and not each.oracle
        ]
        adjusted = dict(zip(candidates, holm([paired[i].p_value for i in candidates]), strict=True))
        rows += [ArmComparison(each, paired[i], adjusted.get(i)) for i, each in enumerate(group)]
    return rows

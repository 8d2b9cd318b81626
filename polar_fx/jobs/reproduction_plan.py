"""How much of a reproduction fits a budget of time: sizes between those of two presets and beyond,
and the seconds that each stage is expected to take.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from ..output.files import write_whole
from ..output.plain_text import duration, table
from ..training.pipeline import TrainingConfig
from .fit import PRESETS
from .questions import PER_CELL
from .stages import Probe, Size

if TYPE_CHECKING:
    from ..questions import Split

Protocol = Literal["tasks", "paper"]

# Scale 0 is the first of each protocol, scale 1 the second; between and beyond, numbers grow by the
# same factor with each step.
_SIZES: "dict[str, tuple[Size, Size]]" = {
    "tasks": (PRESETS["quick"], PRESETS["full"]),
    "paper": (
        replace(PRESETS["quick"], searched=60),
        replace(PRESETS["full"], searched=6250, train=6250, validation=1250, tested=2500),
    ),
}
_ANSWERS = {"tasks": (0, 0), "paper": (20, 1000)}
_LEAST_SCALE, _MOST_SCALE, _STEPS = -1.5, 2.0, 350
_MOST_SIMULATIONS = 200  # a question, as in the paper
_LEAST_SEARCHED = 5  # questions
_LEAST_MENU, _MOST_MENU = 4, 64
_OTHERS = 14  # programs a question that baselines run beside the menu
_VOTES = 3
_ANSWERED = 2 + 2 * _VOTES  # answers a question: identity, choice, programs and samples that vote
# Seconds a question that learning takes beside running programs: the selector's networks and
# features, and the networks of the baselines.
_LEARNING, _BASELINES = 0.02, 0.1
_FIXED = 10.0  # seconds of a stage that depend on nothing
# Of a program's time in a search: where few programs run on many questions, batches are larger.
_IDENTITY, _LISTED = 0.35, 0.5
_MARGIN = 0.9  # of the budget is planned, because a short measurement tells only about


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What short searches told, and the seconds that they took; `answering` is of one whose
    answers were generated (None: none will be). `identities` questions, which the identity alone
    answers, tell in a stage how difficult its questions are.
    """

    verdicts: Probe
    answering: Probe | None
    seconds: float
    identities: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of a reproduction, which a run that goes on must share; how much it does; and the
    seconds that each stage is expected to take.
    """

    settings: dict[str, Any]
    scale: float
    size: Size
    answers: int
    seconds: dict[str, float]
    measured: dict[str, float]

    @classmethod
    def fitting(
        cls, settings: Mapping[str, Any], measured: Measured, *, there: "Mapping[Split, int]"
    ) -> "Plan":
        """The largest that is expected to end within `settings["budget"]`, in hours, with the
        measurement; of at most the questions that `there` are.

        Raises InputError, which names the smallest budget, where none is.
        """
        budget = 3600 * settings["budget"]
        step = (_MOST_SCALE - _LEAST_SCALE) / _STEPS
        chosen = None
        for i in range(_STEPS + 1):
            plan = cls._at(settings, measured, scale=_LEAST_SCALE + i * step, there=there)
            if plan.total > _MARGIN * budget:
                break
            chosen = plan
        if chosen is None:
            least = cls._at(settings, measured, scale=_LEAST_SCALE, there=there)
            hours = math.ceil(100 * least.total / _MARGIN / 3600) / 100
            raise InputError(
                f"a budget of {settings['budget']:g} hours is too small: the smallest "
                f"reproduction of this model takes about {duration(least.total)} here; give at "
                f"least {hours:g} hours"
            )
        return chosen

    @classmethod
    def _at(
        cls,
        settings: Mapping[str, Any],
        measured: Measured,
        *,
        scale: float,
        there: "Mapping[Split, int]",
    ) -> "Plan":
        size = size_at(settings["protocol"], scale).within(there)
        answers = min(size.tested, _between(*_ANSWERS[settings["protocol"]], scale=scale))
        told = {
            "evaluations_per_second": measured.verdicts.evaluations_per_second,
            "opening_seconds": measured.verdicts.opening,
        }
        if measured.answering is not None:
            told["answers_per_second"] = measured.answering.evaluations_per_second
        return cls(
            settings=dict(settings),
            scale=round(scale, 2),
            size=size,
            answers=answers,
            seconds=_expected(size, answers, measured=measured),
            measured=told,
        )

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `read`."""
        return {
            "settings": self.settings,
            "scale": self.scale,
            "size": size_as_json(self.size),
            "answers": self.answers,
            "expected_seconds": self.seconds,
            "measured": self.measured,
        }

    def write(self, path: Path) -> Path:
        """Raises InputError."""
        return write_whole(json.dumps(self.to_dict(), indent=1).encode() + b"\n", path)

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any]) -> "Plan":
        """The plan that is kept there. Raises InputError if it cannot be read, or is one of other
        settings, naming what differs.
        """
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            theirs = dict(kept["settings"])
            plan = cls(
                settings=theirs,
                scale=kept["scale"],
                size=_size_of(kept["size"]),
                answers=kept["answers"],
                seconds=kept["expected_seconds"],
                measured=kept["measured"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no plan of a reproduction ({error!r}); bring it back, or name another "
                "folder"
            ) from error
        other = [
            f"{name} {theirs.get(name)!r}, not {settings.get(name)!r}"
            for name in dict.fromkeys((*theirs, *settings))
            if theirs.get(name) != settings.get(name)
        ]
        if other:
            raise InputError(
                f"{path.parent} holds a reproduction of other settings: {'; '.join(other)}. Give "
                "the same ones to go on with it, or name another folder"
            )
        return plan

    def lines(self) -> list[str]:
        """For people: how much each stage does, and the minutes it is expected to take."""
        size, config = self.size, self.size.training
        rows = {
            "measure": "how long this machine takes, on train questions",
            "search": f"{size.searched:,} train questions, {size.simulations} programs each",
            "menu": f"{config.menu_size} programs chosen on "
            f"{min(size.train, config.screen_questions + config.final_questions):,} train "
            "questions",
            "train": f"{size.train:,} train and {size.validation:,} validation questions",
            "evaluate": f"{size.tested:,} test questions, asked once"
            + (f"; {self.answers:,} of them also generated" if self.answers else ""),
        }
        cells = [(name, what, f"{self.seconds[name] / 60:.1f}") for name, what in rows.items()]
        cells.append(("all", f"budget {self.settings['budget']:g} h", f"{self.total / 60:.1f}"))
        return table(("stage", "what", "minutes"), cells, right=("minutes",))


def size_at(protocol: str, scale: float) -> Size:
    """How much a protocol does at a scale."""
    low, high = _SIZES[protocol]

    def of(name: str) -> int:
        return _between(getattr(low, name), getattr(high, name), scale=scale)

    def of_training(name: str) -> int:
        return _between(getattr(low.training, name), getattr(high.training, name), scale=scale)

    return Size(
        searched=max(_LEAST_SEARCHED, of("searched")),
        simulations=min(_MOST_SIMULATIONS, of("simulations")),
        train=of("train"),
        validation=of("validation"),
        tested=of("tested"),
        training=TrainingConfig(
            menu_size=min(_MOST_MENU, max(_LEAST_MENU, of_training("menu_size"))),
            num_candidates=of_training("num_candidates"),
            num_edits=of_training("num_edits"),
            num_variations=of_training("num_variations"),
            screen_questions=of_training("screen_questions"),
            num_finalists=max(_LEAST_MENU, of_training("num_finalists")),
            final_questions=of_training("final_questions"),
        ),
    )


def _between(low: int, high: int, *, scale: float) -> int:
    """`low` at scale 0, `high` at 1; 0 stays 0."""
    return max(1, round(low * (high / low) ** scale)) if low else 0


def _expected(size: Size, answers: int, *, measured: Measured) -> dict[str, float]:
    """Seconds a stage."""
    each = 1 / measured.verdicts.evaluations_per_second
    listed = _LISTED * each
    opening = measured.verdicts.opening + _FIXED
    learned = size.train + size.validation
    identity = _IDENTITY * each
    few = min(measured.identities, PER_CELL * size.searched)  # a cell a question, at most
    seconds = {
        "measure": measured.seconds,
        "search": opening + identity * few + each * size.search_evaluations,
        "menu": listed * size.menu_evaluations,
        "train": opening + listed * size.label_evaluations + _LEARNING * learned,
        "evaluate": opening
        + identity * measured.identities
        + listed * (size.test_evaluations + size.tested * _OTHERS)
        + (listed + _BASELINES) * learned,
    }
    if measured.answering is not None:
        one = 1 / measured.answering.evaluations_per_second
        seconds["evaluate"] += one * answers * _ANSWERED
    return seconds


def size_as_json(size: Size) -> dict[str, Any]:
    """Numbers alone: settings of training that do not scale are left to their defaults."""
    scaled = {name: getattr(size.training, name) for name in _SCALED}
    return {**asdict(size), "training": scaled}


_SCALED = (
    "menu_size",
    "num_candidates",
    "num_edits",
    "num_variations",
    "screen_questions",
    "num_finalists",
    "final_questions",
)


def _size_of(values: Mapping[str, Any]) -> Size:
    return Size(**{**values, "training": TrainingConfig(**values["training"])})

"""What an evaluation comes to: a few lines, and one sentence."""

from collections.abc import Iterable, Sequence

from ..output.plain_text import count
from ..stats.arms import IDENTITY, ArmResult, pool
from ..stats.intervals import wilson
from ..stats.paired import Estimate, Paired
from .choices import BEST_STATIC, SELECTOR_ACCURACY, SELECTOR_PRICED

# Points that may be lost where fewer steps are the aim.
_CLOSE = 1.5


def conclusion(arms: Sequence[ArmResult]) -> str:
    """Five lines at most and a sentence, of the results of all methods and tasks, all tasks taken
    together.

    The policies that save steps are several: that one of them is shown was decided by the questions
    it is shown for, and the line says so.
    """
    names = dict.fromkeys(arm.name for arm in arms)
    paired = {name: _paired(arms, name) for name in names if _is_shown(name)}
    identity, accurate = paired[IDENTITY], paired[SELECTOR_ACCURACY]
    cheap = _cheapest(paired)
    num_tasks = len({arm.task for arm in arms})
    lines = [
        f"{count(identity.n, 'test question')} of {count(num_tasks, 'task')}",
        _line("the model as it is", identity),
        _line("policy accuracy", accurate),
    ]
    if cheap is not None:
        name = f"policy mean_steps<={cheap.removeprefix(SELECTOR_PRICED)}"
        lines.append(_line(f"{name}, the cheapest that is close", paired[cheap]))
    if BEST_STATIC in paired:
        lines.append(_line("the best program for all", paired[BEST_STATIC]))
    always = all(_is_identity(arm) for arm in arms if arm.name == SELECTOR_ACCURACY)
    saving = None if cheap is None else paired[cheap]
    return "\n".join([*lines, _sentence(accurate, saving=saving, always=always)])


def _is_shown(name: str) -> bool:
    """Whether one of the lines may tell of a method."""
    fixed = (IDENTITY, SELECTOR_ACCURACY, BEST_STATIC)
    return name in fixed or name.startswith(SELECTOR_PRICED)


def _paired(arms: Iterable[ArmResult], name: str) -> Paired:
    return pool([arm for arm in arms if arm.name == name]).paired()


def _is_identity(arm: ArmResult) -> bool:
    return bool((arm.steps == arm.identity_steps).all() and (arm.right == arm.identity_right).all())


def _cheapest(paired: dict[str, Paired]) -> str | None:
    """The policy of fewest steps among those that save some and are close to the identity."""
    close = [
        (found.step_ratio.value, name)
        for name, found in paired.items()
        if name.startswith(SELECTOR_PRICED) and found.step_ratio is not None and _is_close(found)
    ]
    return min(close)[1] if close else None


def _is_close(found: Paired) -> bool:
    ratio = found.step_ratio
    return found.score.low > -_CLOSE and ratio is not None and ratio.high < 1


def _line(name: str, found: Paired) -> str:
    low, high = (100 * end for end in wilson(found.method.count, found.n))
    text = f"{name}: {100 * found.method.count / found.n:.1f} % right [{low:.1f}, {high:.1f}]"
    if found.steps is not None and found.step_ratio is not None:
        text += f", {found.steps.value:.1f} steps ({100 * found.step_ratio.value:.0f} %)"
    return text + (f", {_points(found.score)} points" if found.gained or found.lost else "")


def _points(gain: Estimate) -> str:
    value, low, high = (f"{each:+.1f}" for each in (gain.value, gain.low, gain.high))
    return f"{value} [{low}, {high}]"


def _sentence(accurate: Paired, *, saving: Paired | None, always: bool) -> str:
    said = []
    if always:
        said.append(
            "the policy accuracy runs the model as it is on every question, because no program was "
            "shown on validation questions to lose nothing: ask more of them, or use a policy of "
            "steps"
        )
    elif accurate.score.low > 0:
        said.append("the predictor clearly answers more questions than the model does as it is")
    elif accurate.score.high < 0:
        said.append("the predictor clearly answers fewer questions: do not use the policy accuracy")
    else:
        said.append("no gain or loss of the policy accuracy is clear with so many questions")
    if saving is not None and saving.step_ratio is not None:
        said.append(
            f"{100 * (1 - saving.step_ratio.value):.0f} % of the steps can be saved at a loss of "
            f"less than {_CLOSE:g} points"
        )
    return f"Verdict: {'; '.join(said)}."

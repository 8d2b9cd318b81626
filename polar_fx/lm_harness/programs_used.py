"""Which programs an evaluation ran, and how many steps they took, so that scores and steps are
stated together.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..runtime.dispatcher import Decision


class ProgramsUsed:
    """Decisions by task and question.

    A question may be several requests: one an answer to choose from, or one a window.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, dict[Any, list[Decision]]] = {}

    def add(self, requests: Sequence[Any], decisions: Sequence[Decision]) -> None:
        """Note what each request (lm-eval's `Instance`) ran."""
        for request, decision in zip(requests, decisions, strict=True):
            questions = self._tasks.setdefault(request.task_name or "", {})
            key = ("nameless", len(questions)) if request.doc_id is None else request.doc_id
            questions.setdefault(key, []).append(decision)

    def to_dict(self) -> dict[str, Any]:
        """By task: counts, the programs by how often they ran, and executed steps, as JSON values.

        `mean_steps` weighs each question alike, as accuracy does. `instead` counts requests that
        ran the identity in place of what was chosen, by reason.
        """
        return {task: _summary(list(questions.values())) for task, questions in self._tasks.items()}


def _summary(questions: list[list[Decision]]) -> dict[str, Any]:
    decisions = [d for question in questions for d in question]
    programs = Counter(d.program for d in decisions).most_common()
    reasons = Counter(d.reason for d in decisions if d.reason != "policy")
    return {
        "questions": len(questions),
        "requests": len(decisions),
        "mean_steps": fmean(map(_mean_steps, questions)),
        "programs": [{"program": str(p), "steps": p.num_steps, "requests": n} for p, n in programs],
        "instead": dict(reasons),
    }


def _mean_steps(decisions: list[Decision]) -> float:
    return fmean(decision.num_steps for decision in decisions)

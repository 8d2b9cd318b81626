"""A page to look at an evaluation question by question: one HTML file that needs nothing else.

Shape legend: N questions, K programs of a menu, P policies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..output.markup import Markup, escaped
from ..output.page import filled, json_in_html
from ..predictor.menu import Menu, Proposal
from ..predictor.policy import Calibration, Policy
from ..predictor.selector import Selector
from ..program import Program
from ..program.strip import legend_svg
from ..questions.question import Question
from ..stats.intervals import Share

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True, eq=False)
class Page:
    """What the page shows: a menu's programs on N questions.

    `proposals` are N, with the predicted probabilities of a right answer, `right` bool[N, K] what
    came true. `answers` are generated texts by the place of their question; those of programs
    beside the menu are left out.
    """

    title: str
    menu: Menu
    calibration: Calibration
    questions: Sequence[Question]
    proposals: Sequence[Proposal]
    right: np.ndarray
    answers: Mapping[int, Mapping[Program, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        selector: Selector,
        *,
        title: str,
        questions: Sequence[Question],
        proposals: Sequence[Proposal],
        right: np.ndarray,
        answers: Mapping[int, Mapping[Program, str]],
    ) -> "Page":
        """The page of a selector's menu and calibration."""
        return cls(
            title=title,
            menu=selector.menu,
            calibration=selector.calibration,
            questions=questions,
            proposals=proposals,
            right=right,
            answers=answers,
        )

    def html(self) -> str:
        """The whole page. Questions, answers and names are untrusted text, and stay text."""
        strips = "".join(
            f'<symbol id="strip-{k}">{program.strip().svg(ticks=False)}</symbol>'
            for k, program in enumerate(self.menu.programs)
        )
        parts = {
            "title": escaped(self.title),
            "legend": Markup(legend_svg()),
            "strips": Markup(strips),
            "data": json_in_html(self.data()),
        }
        return filled(_TEMPLATE.read_text(encoding="utf-8"), parts)

    def data(self) -> dict[str, Any]:
        """What the page's script reads, as JSON values; programs are numbers, their places on the
        menu.
        """
        best = Share.of(map(any, self.right))
        return {
            "depth": self.menu.depth,
            "programs": [
                {"text": str(p), "words": p.words, "steps": p.num_steps} for p in self.menu.programs
            ],
            "policies": self.policies(),
            "best": best.value,
            "questions": list(map(self._row, range(len(self.questions)))),
        }

    def _row(self, place: int) -> dict[str, Any]:
        """A question, with what the selector and the programs said to it."""
        question, said = self.questions[place], self.answers.get(place, {})
        number = {program: k for k, program in enumerate(self.menu.programs)}
        answers = {number[program]: text for program, text in said.items() if program in number}
        return {
            "task": question.task,
            "question": question.question,
            "accepted": question.answers[0],
            "chances": [round(float(p), 3) for p in self.proposals[place].probabilities],
            "right": list(map(int, self.right[place])),
            "answers": answers,
        }

    def policies(self) -> list[dict[str, Any]]:
        """Every policy that the menu and calibration allow, by mean steps: its text, the program it
        chooses for each question, its share of right answers with Wilson's 95 % interval, and its
        mean steps.
        """
        texts = ["identity", "accuracy", *(f"mean_steps<={f:g}" for f in self.calibration.prices)]
        texts += [f"steps<={_share_of(s, self.menu.depth)}" for s in sorted(set(self.menu.steps))]
        found = []
        for text in texts:
            policy = Policy.parse(text, self.menu.depth)
            chosen = [policy.choose(each, self.calibration) for each in self.proposals]
            share = Share.of(self.right[np.arange(len(chosen)), chosen]).to_dict()
            found.append(
                {
                    "policy": text,
                    "chosen": chosen,
                    "accuracy": share["share"],
                    "low": share["low"],
                    "high": share["high"],
                    "steps": float(self.menu.steps[chosen].mean()),
                }
            )
        return sorted(found, key=lambda policy: policy["steps"])


def _share_of(steps: float, depth: int) -> str:
    """The share of `depth` that `steps` are, rounded up, so that a budget of it admits them."""
    return f"{math.ceil(1e4 * steps / depth - 1e-6) / 1e4:g}"

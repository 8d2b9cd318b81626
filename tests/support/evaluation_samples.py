"""Four questions of two tasks, a menu of three programs and their verdicts, small enough to compare
methods by hand.
"""

import numpy as np
import torch

from polar_fx.judge.verdict import Verdict
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, Question
from polar_fx.search.records.records import Explored, SearchRecord

DEPTH = 6
IDENTITY = Program.identity(DEPTH)
SHORT, LONG = Program.parse("skip 3-4", DEPTH), Program.parse("repeat 5", DEPTH)
MENU = Menu((IDENTITY, SHORT, LONG))  # 6, 4 and 7 steps

# a row a question, a column a program of the menu
RIGHT = np.array(
    [[True, True, False], [False, True, True], [False, False, True], [True, False, True]]
)
CHANCES = np.array([[0.6, 0.5, 0.1], [0.2, 0.7, 0.6], [0.3, 0.3, 0.3], [0.1, 0.4, 0.9]])
PROPOSALS = [Proposal(MENU.programs, MENU.steps, row) for row in CHANCES]
QUESTIONS = [
    Question("a1", "add", "1+1", ("2",), difficulty=1),
    Question("a2", "add", "1+2", ("3",), difficulty=2),
    Question("m1", "mul", "2*2", ("4",), difficulty=1),
    Question("m2", "mul", "2*3", ("6",)),
]


def record(question: Question, right: np.ndarray) -> SearchRecord:
    """A record of every program of the menu, from bool[K]."""
    others = zip(MENU.programs[1:], right[1:], strict=True)
    explored = tuple(Explored(p, Verdict(bool(r)), float(r)) for p, r in others)
    return SearchRecord(question, DEPTH, Verdict(bool(right[0])), explored)


RECORDS = [record(q, r) for q, r in zip(QUESTIONS, RIGHT, strict=True)]
ROWS = [(q, EncodedQuestion(q.id, (), (1, 2), ((3,),))) for q in QUESTIONS]


def selector(calibration: Calibration | None = None) -> Selector:
    """A selector over the menu; its network is of no interest, since `CHANCES` are given."""
    network = SelectorNetwork(2, len(MENU), width=0)
    return Selector(
        MENU,
        Features(2, 4),
        network=network,
        calibration=calibration,
        slopes=torch.ones(3),
        shifts=torch.zeros(3),
    )

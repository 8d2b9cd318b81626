"""Choices compared by teacher forcing: what plain forward passes give, whatever is shared."""

import math
import random
from typing import Any

import pytest
import torch

import polar_fx
from polar_fx.compiled import CompiledModel
from polar_fx.errors import InputError
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.judge.verdict import choice_verdict
from polar_fx.program import Program
from polar_fx.questions import ChoiceKey, EncodedQuestion, best_choice
from tiny_search import peaked, random_programs

DEPTH = 6
PROGRAMS = random_programs(DEPTH, 12)


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return polar_fx.compile(peaked(), "eager", max_length=47, cache=False)


def asked(count: int = 9) -> list[EncodedQuestion]:
    """Prompts of one token and more, two to four choices, scored whole or at their end."""
    rng = random.Random(2)
    found = []
    for i in range(count):
        prompt = tuple(rng.randrange(40) for _ in range((1, 2, 11)[i % 3]))
        choices: list[tuple[int, ...]] = []
        for _ in range(2 + i % 3):
            choices.append(tuple(rng.randrange(40) for _ in range(rng.randint(2, 6))))
        scored = tuple(len(c) if i % 2 else 2 for c in choices)
        lengths = tuple(float(len(c)) for c in choices) if i % 4 == 1 else (1.0,) * len(choices)
        key = ChoiceKey(rng.randrange(len(choices)), scored, lengths, scored)
        found.append(EncodedQuestion(f"c{i}", (), prompt, tuple(choices), key))
    return found


def expected(
    compiled: CompiledModel, question: EncodedQuestion, *, program: Program
) -> list[float]:
    """Scores from one plain forward pass a choice."""
    assert question.choice is not None
    found = []
    for target, scored, length in zip(
        question.targets, question.choice.scored, question.choice.lengths, strict=True
    ):
        logits = compiled.forward(torch.tensor([question.prompt + target]), program=program)[0]
        gold = torch.tensor(target[-scored:])
        of_end = logits[-scored - 1 : -1].log_softmax(-1).gather(-1, gold[:, None])
        found.append(float(of_end.sum()) / length)
    return found


@pytest.mark.parametrize("deterministic", [False, True])
def test_scores_are_those_of_plain_passes(compiled: CompiledModel, deterministic: bool) -> None:
    pairs = [(q, p) for q in asked() for p in PROGRAMS]
    random.Random(1).shuffle(pairs)
    forcing = TeacherForcing(compiled, deterministic=deterministic)
    verdicts, scores = forcing.evaluate(pairs), forcing.choice_scores(pairs)
    assert forcing.steps_run < forcing.steps_asked
    right = 0
    for (question, program), verdict, found in zip(pairs, verdicts, scores, strict=True):
        plain = expected(compiled, question, program=program)
        assert found == pytest.approx(plain, abs=1e-3)
        assert question.choice is not None
        assert verdict == choice_verdict(found, question.choice.right)
        assert verdict.correct == (best_choice(plain) == question.choice.right)
        right += verdict.correct
    assert 10 < right < len(pairs) - 10


def test_a_forgotten_question_leaves_nothing(compiled: CompiledModel) -> None:
    forcing = TeacherForcing(compiled)
    forcing.evaluate([(q, p) for q in asked() for p in PROGRAMS])
    forcing.forget([q.id for q in asked()])
    assert forcing.trie.num_bytes == 0 and not forcing.trie.root.children


def test_choices_and_answers_are_judged_together(compiled: CompiledModel) -> None:
    written = EncodedQuestion("w", (1, 2, 3), (4, 5), ((6, 7),))
    pairs: Any = [(q, p) for q in (*asked(3), written) for p in PROGRAMS[:4]]
    forcing = TeacherForcing(compiled)
    together = forcing.evaluate(pairs)
    apart = [TeacherForcing(compiled).evaluate([pair])[0] for pair in pairs]
    for one, other in zip(together, apart, strict=True):
        assert one.correct == other.correct
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)
    with pytest.raises(InputError, match="question 'w' has no choices to score"):
        forcing.choice_scores([(written, PROGRAMS[0])])


def test_a_verdict_says_share_and_lead() -> None:
    scores = [math.log(0.2), math.log(0.6), math.log(0.2)]
    verdict = choice_verdict(scores, 1)
    assert verdict.correct
    assert verdict.log_likelihood == pytest.approx(math.log(0.6))
    assert verdict.margin == pytest.approx(math.log(3))
    assert not choice_verdict(scores, 2).correct
    assert choice_verdict([-1.0, -1.0], 0).correct and not choice_verdict([-1.0, -1.0], 1).correct
    assert choice_verdict([math.nan, -1.0], 1).correct
    assert not choice_verdict([math.nan, math.nan], 0).correct

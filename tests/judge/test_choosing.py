"""Answers to questions with choices: those of single programs, and no layer runs twice for an
exit.
"""

import math
from dataclasses import replace

import pytest

import polar_fx
from polar_fx.compiled import CompiledModel
from polar_fx.errors import InputError
from polar_fx.judge.choosing import Chooser, choice_scores, first_layers
from polar_fx.judge.early_exit import NUM_FEATURES, EarlyExit, EarlyExits
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.program import Program
from polar_fx.questions import Question, any_template
from tiny_bundles import tokenizer_of_words
from tiny_search import peaked

DEPTH = 6
WORDS = ["red", "blue", "green", "salt", "sand", "ice"]
CHOICES = [tuple(WORDS[k : k + 2 + k % 2]) for k in range(4)] * 3
QUESTIONS = [
    Question(f"q{i}", ("one", "two")[i % 2], f"{WORDS[i % 6]} or {WORDS[-i % 6]}", c[:1], choices=c)
    for i, c in enumerate(CHOICES)
]


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return polar_fx.compile(peaked(), "eager", max_length=47, cache=False)


def exits(compiled: CompiledModel, threshold: float) -> EarlyExits:
    """Of the task `one` alone, by the best score, with two choices that are as good as equal."""
    rule = EarlyExit(2, threshold, (1e-9,) + (0.0,) * (NUM_FEATURES - 1), {})
    return EarlyExits({"one": rule}, compiled.library.weights_fingerprint, "choices")


def test_each_answer_is_the_best_of_its_program(compiled: CompiledModel) -> None:
    tokenizer = tokenizer_of_words()
    found = Chooser(compiled, tokenizer, early_exits=exits(compiled, 0.4)).choose(QUESTIONS)
    identity, early = Program.identity(DEPTH), first_layers(2, DEPTH)
    assert [each.program for each in found] == [early, identity] * 6
    forcing = TeacherForcing(compiled)
    for question, answer in zip(QUESTIONS, found, strict=True):
        encoded = any_template("choices", question.task).encode(tokenizer, question)
        (expected,) = choice_scores(forcing, [encoded], program=answer.program)
        shown = expected.scores if answer.program == identity else [math.log(1 / 2)] * 2
        assert answer.scores == pytest.approx(shown, abs=1e-4)
        assert answer.place == expected.best and answer.text == question.choices[expected.best]


def test_a_question_that_stays_runs_no_layer_twice(compiled: CompiledModel) -> None:
    tokenizer = tokenizer_of_words()
    plain = Chooser(compiled, tokenizer)
    expected = plain.choose(QUESTIONS)
    tried = Chooser(compiled, tokenizer, early_exits=exits(compiled, 0.6))
    found = tried.choose(QUESTIONS)
    assert found == expected
    assert tried.forcing.steps_run == plain.forcing.steps_run
    gone = Chooser(compiled, tokenizer, early_exits=exits(compiled, 0.4))
    gone.choose(QUESTIONS)
    assert gone.forcing.steps_run < plain.forcing.steps_run
    assert not plain.forcing.trie.num_bytes, "nothing of an answered question is kept"


def test_exits_of_another_model_or_prompt_are_refused(compiled: CompiledModel) -> None:
    good, tokenizer = exits(compiled, 0.5), tokenizer_of_words()
    with pytest.raises(InputError, match="this model is another one or in another dtype"):
        Chooser(compiled, tokenizer, early_exits=replace(good, weights="0" * 64))
    with pytest.raises(InputError, match="learned in the prompt 'choices', and 'choices-norm'"):
        Chooser(compiled, tokenizer, prompt="choices-norm", early_exits=good)
    whole = replace(good, tasks={"one": replace(good.tasks["one"], num_steps=DEPTH)})
    with pytest.raises(InputError, match=f"exit of one is after {DEPTH} layers, and this model"):
        Chooser(compiled, tokenizer, early_exits=whole)
    with pytest.raises(InputError, match="no choices"):
        Chooser(compiled, tokenizer).choose([Question("q", "one", "red?", ("blue",))])

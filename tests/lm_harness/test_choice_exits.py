"""Early exits of questions with choices in lm-eval: the choices of `Chooser`, and their steps."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness_samples import DEPTH, LENGTH, evaluate_tasks, requests_of
from polar_fx.errors import InputError
from polar_fx.judge.choosing import Chooser, Chosen, choice_scores, first_layers
from polar_fx.judge.early_exit import NUM_FEATURES, EarlyExit, EarlyExits
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.questions import Question, any_template
from polar_fx.questions.choices import choice_template

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'polar_fx[harness]'")

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

from polar_fx.lm_harness import PolarLM

# lm-eval's and datasets' own are not ours to fail on
pytestmark = pytest.mark.filterwarnings("default")

WORDS = ("red", "blue sky", "a stone", "ice and salt", "no", "the sun")
QUESTIONS = [
    Question(
        f"q{i}",
        ("arc_easy", "social_iqa")[i % 2],
        f"{WORDS[i % 6]} or {WORDS[-i % 6]} {i}?",
        (WORDS[i % 5],),
        choices=tuple(WORDS[i % 5 : i % 5 + 2 + i % 3 // 2]),
    )
    for i in range(16)
]
STEPS = 2


def exits_of(compiled: Any, tokenizer: Any, *, prompt: str = "choices") -> EarlyExits:
    """Of arc_easy alone, by the log-likelihoods after two layers; the surer half leaves."""
    asked = [q for q in QUESTIONS if q.task == "arc_easy"]
    encoded = any_template(prompt, "arc_easy").encode_all(tokenizer, asked)
    scores = choice_scores(TeacherForcing(compiled), encoded, program=first_layers(STEPS, DEPTH))
    weights = (0.7, *[0.0] * (NUM_FEATURES - 3), 0.2, 0.1)
    rule = EarlyExit(STEPS, 0.0, weights, {})
    threshold = float(np.median(rule.read(scores).sureness))
    rules = {"arc_easy": EarlyExit(STEPS, threshold, weights, {})}
    return EarlyExits(rules, compiled.library.weights_fingerprint, prompt)


def choices_of(question: Question, doc: int) -> list[Any]:
    """lm-eval's requests of one question."""
    pairs = choice_template("choices", question.task).pairs(question)
    place = (question.task, doc, 1)
    return [Instance("loglikelihood", {}, pair, i, place) for i, pair in enumerate(pairs)]


def all_requests() -> list[Any]:
    """Of all questions, in their order."""
    return list(chain(*(choices_of(question, doc) for doc, question in enumerate(QUESTIONS))))


def answered(lm: PolarLM) -> list[list[float]]:
    """Of each question what was told of each choice; all requests are made at once."""
    told = iter(lm.loglikelihood(all_requests(), disable_tqdm=True))
    found = []
    for question in QUESTIONS:
        found.append([next(told)[0] for _ in question.choices])
    return found


def chosen(compiled: Any, tokenizer: Any, *, exits: EarlyExits) -> list[Chosen]:
    chooser = Chooser(compiled, tokenizer, prompt=exits.prompt, early_exits=exits)
    return chooser.choose(QUESTIONS)


@pytest.mark.parametrize("prompt", ["choices", "choices-norm"])
def test_choices_are_those_of_the_chooser(compiled: Any, tokenizer: Any, prompt: str) -> None:
    exits = exits_of(compiled, tokenizer, prompt=prompt)
    lm = PolarLM(compiled, tokenizer, exits=exits)
    expected = chosen(compiled, tokenizer, exits=exits)
    left = [each.program.num_steps == STEPS for each in expected]
    assert 2 <= sum(left) < 8, "some leave, and some of the task stay"
    for question, told, one in zip(QUESTIONS, answered(lm), expected, strict=True):
        divided = prompt == "choices-norm" and question.task == "arc_easy"
        lengths = [len(c) if divided else 1 for c in question.choices]
        if divided or prompt == "choices":
            seen = np.array(told) / lengths  # as acc_norm does
            assert int(seen.argmax()) == one.place
            assert seen == pytest.approx(one.scores, abs=1e-4)
    tasks = lm.report()["tasks"]
    assert tasks["arc_easy"]["questions"] == 8 and tasks["social_iqa"]["mean_steps"] == DEPTH
    steps = [each.program.num_steps for each in expected[::2]]
    assert tasks["arc_easy"]["mean_steps"] == pytest.approx(np.mean(steps))
    assert lm.report()["exits"] == {"arc_easy": STEPS}


def test_what_stays_has_the_whole_models_numbers(compiled: Any, tokenizer: Any) -> None:
    exits = exits_of(compiled, tokenizer)
    plain = PolarLM(compiled, tokenizer).loglikelihood(all_requests(), disable_tqdm=True)
    lm = PolarLM(compiled, tokenizer, exits=exits)
    expected = iter(zip(plain, lm.loglikelihood(all_requests(), disable_tqdm=True), strict=True))
    for question, one in zip(QUESTIONS, chosen(compiled, tokenizer, exits=exits), strict=True):
        for _ in question.choices:
            whole, told = next(expected)
            if one.program.is_identity:
                assert told[0] == pytest.approx(whole[0], abs=1e-4) and told[1] == whole[1]


def test_requests_that_are_no_choices_run_the_whole_model(compiled: Any, tokenizer: Any) -> None:
    exits = exits_of(compiled, tokenizer)
    always = EarlyExit(STEPS, 0.0, exits.tasks["arc_easy"].weights, {})
    exits = EarlyExits({"t": always, "none": always}, exits.weights, exits.prompt)
    lm, plain = PolarLM(compiled, tokenizer, exits=exits), PolarLM(compiled, tokenizer)

    def of(doc: int | None, *pairs: tuple[str, str]) -> list[Any]:
        place = ("t", doc, 1)
        return [Instance("loglikelihood", {}, pair, i, place) for i, pair in enumerate(pairs)]

    long = "b" * LENGTH
    requests = [
        *requests_of("loglikelihood", [("alone", " a")]),
        *of(7, ("as a", " is"), ("as b", " is")),  # contexts that differ
        *of(8, ("", " a"), ("", " b")),  # nothing to choose by
        *of(None, ("of no document", " a"), ("of no document", " b")),
        *of(9, ("long", long[:-2]), ("long", " b")),  # the longest row does not fit
    ]
    expected = plain.loglikelihood(requests, disable_tqdm=True)
    assert lm.loglikelihood(requests, disable_tqdm=True) == expected
    assert lm.report()["tasks"] == plain.report()["tasks"]
    # repeats of a request are told the same, and in their places
    one, two = of(3, ("a or b?", " a"), ("a or b?", " b"))
    told = lm.loglikelihood([two, one, one, two], disable_tqdm=True)
    assert told[0] == told[3] and told[1] == told[2] and told[0] != told[1]
    assert sum(np.exp(value) for value, _ in told[:2]) == pytest.approx(1)


def test_an_evaluation_by_exits_from_a_file(
    folder: Path, made: Any, tokenizer: Any, offline: None, tmp_path: Path
) -> None:
    exits = exits_of(made, tokenizer)
    path = exits.save(tmp_path / "early_exits.json")
    asked = [q for q in QUESTIONS if q.task == "arc_easy"]
    rows = [
        {"question": q.question, "choices": q.choices, "gold": q.choices.index(q.answers[0])}
        for q in asked
    ]
    file = tmp_path / "arc_easy.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "arc_easy",
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(file)},
            "cache_dir": str(tmp_path / "datasets"),
        },
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    lm = PolarLM(str(folder), backend="eager", max_length=LENGTH, exits=str(path))
    found = evaluate_tasks(lm, task)
    places = [each.place for each in chosen(made, tokenizer, exits=exits)[::2]]
    right = [place == row["gold"] for place, row in zip(places, rows, strict=True)]
    assert found["results"]["arc_easy"]["acc,none"] == pytest.approx(np.mean(right))
    told = found["config"]["polar_fx"]["tasks"]["arc_easy"]
    assert told["questions"] == 8 and STEPS < told["mean_steps"] < DEPTH


def test_what_does_not_go_together_is_refused(
    compiled: Any, tokenizer: Any, tmp_path: Path
) -> None:
    exits = exits_of(compiled, tokenizer)
    with pytest.raises(InputError, match="and exits exclude each other"):
        PolarLM(compiled, tokenizer, program="skip 3", exits=exits)
    with pytest.raises(InputError, match="cannot read"):
        PolarLM(compiled, tokenizer, exits=str(tmp_path / "none.json"))
    other = EarlyExits(exits.tasks, "0" * 64, exits.prompt)
    with pytest.raises(InputError, match="this model is another one"):
        PolarLM(compiled, tokenizer, exits=other)
    compiled.dispatch_by(policy="skip 3", unprepared="link")
    with pytest.raises(InputError, match="this one runs a dispatcher"):
        PolarLM(compiled, tokenizer, exits=exits)


def test_a_refused_exit_is_told_as_none(compiled: Any, tokenizer: Any) -> None:
    exits = exits_of(compiled, tokenizer)
    never = EarlyExit(STEPS, np.inf, exits.tasks["arc_easy"].weights, {}, refused="by chance")
    exits = EarlyExits({"arc_easy": never}, exits.weights, exits.prompt)
    lm, plain = PolarLM(compiled, tokenizer, exits=exits), PolarLM(compiled, tokenizer)
    assert answered(lm) == answered(plain)
    assert lm.report()["exits"] == {"arc_easy": None}

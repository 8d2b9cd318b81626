"""Questions with choices: how files say them, and what lm-evaluation-harness would ask."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from polar_fx.errors import InputError
from polar_fx.questions import Question, any_template, choice_template, load_jsonl
from polar_fx.questions.choices import ChoiceTemplate, best_choice
from tiny_search import save_tiny

ROW = {"id": "a", "task": "piqa", "question": "Open it?", "choices": ["Push.", "Pull it."]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny(tmp_path_factory.mktemp("tiny"), depth=2))


def _load(folder: Path, **fields: Any) -> Question:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({**ROW, **fields}))
    return load_jsonl(path)[0]


def _question(text: str = "Open it?", *choices: str, task: str = "piqa") -> Question:
    return Question("a", task, text, (choices[-1],), choices=choices)


def test_an_answer_is_a_place_or_a_text(tmp_path: Path) -> None:
    by_place = _load(tmp_path, answer=1, split="validation")
    assert by_place == _load(tmp_path, answer=" Pull it.", split="validation")
    assert by_place.right_choice == "Pull it." and by_place.split == "validation"
    assert _load(tmp_path, answer=0, split="dev").split is None


def test_ids_tell_questions_of_one_text_apart(tmp_path: Path) -> None:
    one = _load(tmp_path, answer=0, id=None)
    assert one.id != _load(tmp_path, answer=0, id=None, choices=["Push.", "Wait."]).id


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"answer": 2}, "line 1: its answer 2 is none of its 2 choices; give the text of one, or "),
        ({"answer": "Wait."}, "its answer 'Wait.' is none of its 2 choices"),
        ({"answer": True}, "its answer True is none of"),
        ({"answer": 0, "choices": ["Push."]}, "give a list of at least two texts"),
        ({"answer": 0, "choices": ["Push.", " "]}, "its choice ' ' is no text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _load(tmp_path, **fields)


@pytest.mark.parametrize(
    "task, context",
    [
        ("arc_easy", "Question: Why?\nAnswer:"),
        ("arc_challenge", "Question: Why?\nAnswer:"),
        ("openbookqa", "Why?"),
        ("piqa", "Question: Why?\nAnswer:"),
        ("social_iqa", "Q: Why?\nA:"),
        ("my own", "Question: Why?\nAnswer:"),
    ],
)
def test_prompts_are_those_of_lm_eval(task: str, context: str) -> None:
    pairs = choice_template("choices", task).pairs(_question(" Why? ", "So", "No"))
    assert pairs == [(context, " So"), (context, " No")]


def test_after_a_blank_the_rest_is_scored(tokenizer: Any) -> None:
    template = choice_template("choices-norm", "winogrande")
    asked = _question("Ann met Bo, because _ was late.", "Ann", "Bo", task="winogrande")
    before = "Ann met Bo, because "
    assert template.pairs(asked) == [(before + "Ann", " was late."), (before + "Bo", " was late.")]
    encoded = template.encode(tokenizer, asked)
    assert tokenizer.decode(encoded.prompt) == before
    assert [tokenizer.decode(t) for t in encoded.targets] == ["Ann was late.", "Bo was late."]
    assert encoded.choice is not None and encoded.choice.right == 1
    assert encoded.choice.scored == (len(" was late."),) * 2  # bytes are tokens here
    assert encoded.choice.lengths == (1.0, 1.0)


def test_lengths_are_characters(tokenizer: Any) -> None:
    asked = _question("Why?", "né", "No one")
    key = choice_template("choices-norm", "piqa").encode(tokenizer, asked).choice
    assert key is not None and key.lengths == (2.0, 6.0)
    assert key.scored == (len(" né".encode()), len(" No one"))
    assert key.scores((-6.0, -6.0)) == (-3.0, -1.0)
    plain = choice_template("choices", "piqa").encode(tokenizer, asked).choice
    assert plain is not None and plain.scores((-6.0, -7.0)) == (-6.0, -7.0)


def test_what_cannot_be_asked_is_refused(tokenizer: Any) -> None:
    template = choice_template("choices", "winogrande")
    with pytest.raises(InputError, match="has no '_' with text after it"):
        template.encode(tokenizer, _question("Nobody was late.", "Ann", "Bo"))
    with pytest.raises(InputError, match="its choices share no first token"):
        template.encode(tokenizer, _question("_ was late.", "Ann", "Bo"))
    with pytest.raises(InputError, match="it has no choices to compare"):
        choice_template("choices", "piqa").encode(tokenizer, Question("a", "piqa", "6*7", ("42",)))
    with pytest.raises(InputError, match="compares choices, which are not generated"):
        template.decode_stop(tokenizer)
    with pytest.raises(InputError, match="holds {question} 0 times"):
        ChoiceTemplate("mine", 1, "Why?")
    with pytest.raises(InputError, match="unknown prompt 'chosen'"):
        choice_template("chosen")


def test_prompts_are_found_by_name() -> None:
    assert any_template("choices-norm", "piqa").key == "choices-norm:piqa@1"
    assert any_template("choices", "my own").key == "choices:any@1"
    assert any_template("plain").key == "plain@1"


def test_the_first_of_equals_wins_and_no_number_never() -> None:
    assert best_choice([-2.0, -1.0, -1.0]) == 1
    assert best_choice([float("nan"), -1.0]) == 1

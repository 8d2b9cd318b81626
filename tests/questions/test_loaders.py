"""Questions from files and datasets: every field is read as documented; a malformed row is named
and nothing is returned.
"""

import json
import sys
import types
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_fx.errors import InputError
from polar_fx.questions import Question, load_dataset, load_jsonl

DATA = Path("/work/shared/data")


def _file(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


GOOD = {"id": "a", "question": "6 * 7", "answer": "42"}


def test_fields_of_a_file(tmp_path: Path) -> None:
    path = _file(
        tmp_path / "mine.jsonl",
        b'\xef\xbb\xbf{"question": " How many? ", "answer": 7, "difficulty": 3, '
        b'"cell": "small", "other": []}\r',
        b"   ",
        {
            "id": 12,
            "question": "Half?",
            "answer": ["1/2", 0.5, "1/2"],
            "task": "t",
            "difficulty": None,
        },
        {"id": "ü", "question": "Big?", "answer": [1e20, -3.0, 0.1], "dataset": "d"},
    )
    first, second, third = load_jsonl(path)
    assert first == Question(
        first.id, "mine", "How many?", ("7",), 3, "small"
    ) and first.id.startswith("mine:")
    assert second == Question("12", "t", "Half?", ("1/2", "0.5"))
    assert third == Question("ü", "d", "Big?", ("100000000000000000000", "-3", "0.1"))
    assert {q.task for q in load_jsonl(path, task="all")} == {"all"}


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=6
    )
)
def test_numbers_keep_their_value(number: Decimal) -> None:
    with TemporaryDirectory() as folder:
        path = _file(Path(folder) / "x.jsonl", f'{{"question": "q", "answer": {number}}}'.encode())
        (answer,) = load_jsonl(path)[0].answers
    assert Decimal(answer) == number and "E" not in answer


def test_an_id_made_of_the_question_does_not_depend_on_the_rest(tmp_path: Path) -> None:
    (one,) = load_jsonl(_file(tmp_path / "a.jsonl", {"question": "6 * 7", "answer": "42"}))
    (_, two) = load_jsonl(
        _file(tmp_path / "b.jsonl", GOOD, {"question": "6 * 7 ", "answer": [42]}), task="a"
    )
    assert one.id == two.id


BAD: dict[str, tuple[Any, str]] = {
    "bad JSON": (
        b'{"question": ',
        "it is not JSON (Expecting value: line 1 column 14 (char 13)); write one JSON object a "
        "line",
    ),
    "NaN": (b'{"question": "q", "answer": NaN}', "it is not JSON (NaN is not a JSON number)"),
    "deep": (b"[" * 100_000, "it is not JSON ("),
    "latin-1": (
        '{"question": "é", "answer": "1"}'.encode("latin-1"),
        "byte 15 is not UTF-8; save the file as UTF-8",
    ),
    "utf-16": (
        '{"question": "q", "answer": "1"}'.encode("utf-16"),
        "byte 1 is not UTF-8; save the file as UTF-8",
    ),
    "list": ([1], 'it is a list; write an object, such as {"question": "6 * 7", "answer": "42"}'),
    "null": (None, "it is null; write an object"),
    "no question": ({"answer": "1"}, 'it has no question; give a text as "question"'),
    "blank question": ({"question": " \n", "answer": "1"}, "it has no question"),
    "question a number": ({"question": 5, "answer": "1"}, "its question is a number; give a text"),
    "no answer": (
        {"question": "q"},
        'it has no answer, or an empty one; give a short text or a number as "answer"',
    ),
    "blank answer": ({"question": "q", "answer": " "}, "it has no answer, or an empty one"),
    "null in answers": (
        {"question": "q", "answer": ["1", None]},
        "it has no answer, or an empty one",
    ),
    "no answers": (
        {"question": "q", "answer": []},
        "its list of answers is empty; give at least one accepted answer",
    ),
    "answer an object": (
        {"question": "q", "answer": {}},
        "its answer is an object; give a text, a number, or a list of those",
    ),
    "answer true": ({"question": "q", "answer": True}, "its answer is true or false; give a text"),
    "nested answers": ({"question": "q", "answer": [["1"]]}, "its answer is a list; give"),
    "huge answer": (
        b'{"question": "q", "answer": 1e999999999}',
        "its answer is the number 1E+999999999; give numbers of",
    ),
    "same id": (
        {**GOOD, "question": "other"},
        "its id 'a' is that of line 1 too; give each row an id of its own, or drop one",
    ),
    "id a list": ({**GOOD, "id": ["a"]}, "its id is a list; give a text"),
    "difficulty 0": (
        {**GOOD, "id": "b", "difficulty": 0},
        "its difficulty is 0; give a whole number from 1 to 5, or null",
    ),
    "difficulty 6": ({**GOOD, "id": "b", "difficulty": 6}, "its difficulty is 6;"),
    "difficulty text": ({**GOOD, "id": "b", "difficulty": "3"}, "its difficulty is '3';"),
    "difficulty true": ({**GOOD, "id": "b", "difficulty": True}, "its difficulty is True;"),
    "task a number": ({**GOOD, "id": "b", "task": 1}, "its task is a number; give a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_row_is_named(case: str, tmp_path: Path) -> None:
    row, message = BAD[case]
    path = _file(tmp_path / "rows.jsonl", GOOD, b"", row, {**GOOD, "id": "last"})
    with pytest.raises(InputError) as caught:
        load_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line 3: {message}")


def test_the_same_question_twice_without_ids(tmp_path: Path) -> None:
    path = _file(
        tmp_path / "rows.jsonl", {"question": "q", "answer": 1}, {"question": "q", "answer": 2}
    )
    with pytest.raises(
        InputError, match="line 2: its question is that of line 1 too; give each row an id"
    ):
        load_jsonl(path)


def test_no_file_and_no_rows(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="cannot read questions from .*none.jsonl: No such file or directory; name a JSONL "
        "file",
    ):
        load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="Is a directory"):
        load_jsonl(tmp_path)
    with pytest.raises(InputError, match="holds no questions; name one with at least one line"):
        load_jsonl(_file(tmp_path / "empty.jsonl", b"\n \n"))


@pytest.mark.parametrize("name", ["gsm8k_train", "svamp_dev", "dartmath_train", "dartmath_val"])
def test_development_data(name: str) -> None:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    rows = load_jsonl(path)
    assert (
        len(rows)
        == {"gsm8k_train": 6228, "svamp_dev": 703, "dartmath_train": 6250, "dartmath_val": 1250}[
            name
        ]
    )
    assert {q.difficulty for q in rows} == ({1, 2, 3, 4, 5} if name.startswith("dart") else {None})


# HuggingFace datasets


class _Table(list[dict[str, Any]]):
    @property
    def column_names(self) -> list[str]:
        return list(self[0])


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`datasets` with one dataset; records what it is asked for."""
    asked: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> _Table:
        asked.append((name, config, options))
        if options["split"] != "train":
            raise ValueError(f"Unknown split {options['split']!r}.\nShould be one of ['train'].")
        return _Table(
            [
                {"key": 1, "text": "6 * 7", "label": "It is\n#### 1,042", "level": 2},
                {"key": 2, "text": "6 * 8", "label": "#### 48", "level": None},
            ]
        )

    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


COLUMNS: dict[str, Any] = {
    "question": "text",
    "answer": "label",
    "id": "key",
    "difficulty": "level",
}


def test_columns_are_named_by_the_user(fake_datasets: list[Any]) -> None:
    rows = load_dataset(
        "org/set", split="train", config="main", revision="abc", answer_after="####", **COLUMNS
    )
    assert rows == [
        Question("1", "org/set", "6 * 7", ("1042",), 2),
        Question("2", "org/set", "6 * 8", ("48",)),
    ]
    assert fake_datasets == [("org/set", "main", {"split": "train", "revision": "abc"})]
    (first, _) = load_dataset(
        "org/set", split="train", question="text", answer="label", task="mine"
    )
    assert first.task == "mine" and first.answers == ("It is\n#### 1,042",)


def test_what_a_dataset_lacks_is_named(fake_datasets: list[Any]) -> None:
    with pytest.raises(
        InputError,
        match="'org/set' has no column 'question' for question; it has key, text, label, level",
    ):
        load_dataset("org/set", split="train")
    with pytest.raises(
        InputError,
        match="cannot load the dataset 'org/set', split 'dev': Unknown split 'dev'.; check name",
    ):
        load_dataset("org/set", split="dev")
    with pytest.raises(
        InputError, match="org/set, row 1: its answer holds no '@@'; give another answer_after"
    ):
        load_dataset("org/set", split="train", answer_after="@@", **COLUMNS)


def test_without_datasets_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InputError, match="needs `pip install datasets`; or save it as a JSONL file"
    ):
        load_dataset("org/set", split="train")

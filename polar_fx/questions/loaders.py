"""Questions from files and from HuggingFace datasets.

All rows are checked before any is returned.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, get_args

from ..errors import InputError
from ..output.plain_text import first_line
from .question import Question, Split

_MAX_DIGITS = 30  # of a number written out; more is a mistake, or text


def load_jsonl(path: str | Path, task: str | None = None) -> list[Question]:
    """Questions of a JSONL file in UTF-8, one object a line; blank lines do not count.

    Fields: `question`; `answer`, a string, a number, or a list of those, the preferred one first;
    optional `id` (else made of the question's text), `task` or `dataset` (else the file's name; the
    argument `task` is for all rows), `difficulty` (1 to 5, or null), `cell`, `split` (train,
    validation or test; any other is not looked at) and `choices`, a list of at least two texts, of
    which `answer` is one: its text, or its place from 0. Other fields are ignored. Raises
    InputError naming file, line and what is wrong with it.
    """
    path = Path(path)
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(
            f"cannot read questions from {path}: {error.strerror}; name a JSONL file"
        ) from error
    rows = _Rows(str(path), task, default_task=path.stem)
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            rows.add(number, _parse(rows, number, line=line))
    return rows.questions()


def load_dataset(
    name: str,
    *,
    split: str,
    question: str = "question",
    answer: str = "answer",
    answer_after: str = "",
    id: str | None = None,
    difficulty: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    task: str | None = None,
) -> list[Question]:
    """Questions of a HuggingFace dataset; `question`, `answer`, `id` and `difficulty` name its
    columns.

    With `answer_after`, the answer is what follows the last such text in its column, commas between
    digits removed ("####" for GSM8K). `task` is else the dataset's name. Raises InputError where
    `datasets` is not installed, the dataset cannot be loaded, or a row is not valid as in
    `load_jsonl`.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "loading a HuggingFace dataset needs `pip install datasets`; or save it as a JSONL file"
        ) from error
    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # many kinds: unknown name or split, no network, a damaged cache
        raise InputError(
            f"cannot load the dataset {name!r}, split {split!r}: {first_line(error)}; check "
            "name, config and split"
        ) from error
    columns = {"question": question, "answer": answer, "id": id, "difficulty": difficulty}
    for field, column in columns.items():
        if column is not None and column not in table.column_names:
            raise InputError(
                f"the dataset {name!r} has no column {column!r} for {field}; it has "
                f"{', '.join(table.column_names)}"
            )
    rows = _Rows(name, task, default_task=name, unit="row")
    for number, row in enumerate(table, 1):
        values = {field: row[column] for field, column in columns.items() if column is not None}
        if answer_after and isinstance(values["answer"], str):
            _, mark, after = values["answer"].rpartition(answer_after)
            if not mark:
                rows.fail(
                    number,
                    f"its answer holds no {answer_after!r}",
                    remedy="give another answer_after",
                )
            values["answer"] = after.replace(",", "")
        rows.add(number, values)
    return rows.questions()


def _parse(rows: "_Rows", number: int, *, line: bytes) -> Mapping[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        rows.fail(number, f"byte {error.start + 1} is not UTF-8", remedy="save the file as UTF-8")
    try:
        row = json.loads(text, parse_float=Decimal, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        rows.fail(number, f"it is not JSON ({error})", remedy="write one JSON object a line")
    if not isinstance(row, dict):
        rows.fail(
            number,
            f"it is {_kind(row)}",
            remedy='write an object, such as {"question": "6 * 7", "answer": "42"}',
        )
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


class _Rows:
    """Checked rows of one source."""

    def __init__(
        self, source: str, task: str | None, *, default_task: str, unit: str = "line"
    ) -> None:
        self._source, self._task, self._default_task, self._unit = source, task, default_task, unit
        self._questions: list[Question] = []
        self._numbers: dict[str, int] = {}

    def fail(self, number: int, reason: str, *, remedy: str) -> NoReturn:
        raise InputError(f"{self._source}, {self._unit} {number}: {reason}; {remedy}")

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Check a row and keep it."""
        text = self._text(number, row, field="question")
        if not text:
            self.fail(number, "it has no question", remedy='give a text as "question"')
        own = self._text(number, row, field="task") or self._text(number, row, field="dataset")
        task = self._task or own or self._default_task
        question_id = self._text(number, row, field="id", numbers=True)
        choices = self._choices(number, row.get("choices"))
        given = bool(question_id)
        if not given:
            told = "\n".join([text, *choices])
            question_id = f"{task}:{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        first = self._numbers.setdefault(question_id, number)
        if first != number:
            what = f"its id {question_id!r}" if given else "its question"
            self.fail(
                number,
                f"{what} is that of {self._unit} {first} too",
                remedy="give each row an id of its own, or drop one",
            )
        answers = (
            (self._right(number, row.get("answer"), choices=choices),)
            if choices
            else self._answers(number, row.get("answer"))
        )
        split: Any = row.get("split")
        self._questions.append(
            Question(
                question_id,
                task,
                text,
                answers,
                self._difficulty(number, row.get("difficulty")),
                self._text(number, row, field="cell"),
                choices,
                split if split in get_args(Split) else None,
            )
        )

    def questions(self) -> list[Question]:
        """All of them. Raises InputError if there is none."""
        if not self._questions:
            raise InputError(
                f"{self._source} holds no questions; name one with at least one {self._unit}"
            )
        return self._questions

    def _text(
        self, number: int, row: Mapping[str, Any], *, field: str, numbers: bool = False
    ) -> str:
        value: Any = row.get(field)
        if numbers and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if value is None:
            return ""
        if not isinstance(value, str):
            self.fail(number, f"its {field} is {_kind(value)}", remedy="give a text")
        return value.strip()

    def _choices(self, number: int, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) < 2:
            self.fail(
                number, f"its choices are {value!r:.60}", remedy="give a list of at least two texts"
            )
        for choice in value:
            if not isinstance(choice, str) or not choice.strip():
                self.fail(
                    number, f"its choice {choice!r:.60} is no text", remedy="give a text as each"
                )
        return tuple(choice.strip() for choice in value)

    def _right(self, number: int, value: Any, *, choices: tuple[str, ...]) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
            return choices[value]
        if not isinstance(value, str) or value.strip() not in choices:
            self.fail(
                number,
                f"its answer {value!r:.60} is none of its {len(choices)} choices",
                remedy=f"give the text of one, or its place from 0 to {len(choices) - 1}, as "
                '"answer"',
            )
        return value.strip()

    def _answers(self, number: int, value: Any) -> tuple[str, ...]:
        values: Iterable[Any] = value if isinstance(value, list) else [value]
        answers = dict.fromkeys(self._answer(number, v) for v in values)
        if not answers:
            self.fail(
                number, "its list of answers is empty", remedy="give at least one accepted answer"
            )
        return tuple(answers)

    def _answer(self, number: int, value: Any) -> str:
        if value is None or (isinstance(value, str) and not value.strip()):
            self.fail(
                number,
                "it has no answer, or an empty one",
                remedy='give a short text or a number as "answer"',
            )
        if isinstance(value, str):
            return value.strip()
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
            self.fail(
                number,
                f"its answer is {_kind(value)}",
                remedy="give a text, a number, or a list of those",
            )
        exact = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
        if not exact.is_finite() or abs(exact.adjusted()) > _MAX_DIGITS:
            self.fail(
                number,
                f"its answer is the number {value}",
                remedy=f"give numbers of over {_MAX_DIGITS} digits as text",
            )
        return str(int(exact)) if exact == int(exact) else format(exact.normalize(), "f")

    def _difficulty(self, number: int, value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 5:
            self.fail(
                number,
                f"its difficulty is {value!r}",
                remedy="give a whole number from 1 to 5, or null",
            )
        return value


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        str: "a text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return names.get(
        type(value),
        "a number" if isinstance(value, (int, float, Decimal)) else f"a {type(value).__name__}",
    )

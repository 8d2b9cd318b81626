"""What a search found for one question, and its form as one line of JSON."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any

from ...errors import InputError, ProgramError
from ...judge.verdict import Verdict
from ...output.digest import digest
from ...program import Program
from ...questions.question import Question
from ...version import __version__
from ..config import SearchConfig

# raise the version when a field changes its meaning; readers skip fields they don't know
FORMAT, VERSION = "polar_fx.search", 1
COLUMNS = ("program", "correct", "log_likelihood", "margin", "reward")
"""Of a row of `explored`.

Names once, in the header: in each of some 200 rows a question they would triple the file.
"""


@dataclass(frozen=True, slots=True)
class Explored:
    """A program that was run on a question, what it gave, and the reward the search made of
    that.
    """

    program: Program
    verdict: Verdict
    reward: float


@dataclass(frozen=True)
class SearchRecord:
    """One finished question.

    `baseline` is the verdict of the identity over `depth` layers, `explored` every other program,
    each once, in the order of their evaluation. `verified` holds second verdicts, by another
    evaluation, of the programs that got one. `seed` (of this question's search) and `seconds` (of
    evaluation) are None where an imported file does not tell.

    Raises InputError if a program occurs twice, is the identity, or has another depth.
    """

    question: Question
    depth: int
    baseline: Verdict
    explored: tuple[Explored, ...]
    seed: int | None = None
    seconds: float | None = None
    verified: Mapping[Program, Verdict] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        programs = [each.program for each in self.explored]
        where = f"in the record of question {self.question.id!r}"
        if other := next((p for p in (*programs, *self.verified) if p.depth != self.depth), None):
            raise InputError(f"{where}, program {other} has depth {other.depth}, not {self.depth}")
        if Program.identity(self.depth) in programs:
            raise InputError(
                f"{where}, the identity is among the explored; its verdict is the baseline"
            )
        if len(set(programs)) < len(programs):
            twice = next(p for i, p in enumerate(programs) if p in programs[:i])
            raise InputError(
                f"{where}, program {twice} was explored twice; give its first verdict only"
            )

    @property
    def verdicts(self) -> dict[Program, Verdict]:
        """The first verdict of every program that ran, the identity included."""
        return {Program.identity(self.depth): self.baseline} | {
            each.program: each.verdict for each in self.explored
        }

    @property
    def valid(self) -> tuple[Program, ...]:
        """The explored programs that answer right; where a program has a second verdict
        (`verified`), that one counts.
        """
        return tuple(
            each.program
            for each in self.explored
            if self.verified.get(each.program, each.verdict).correct
        )

    @property
    def identity_correct(self) -> bool:
        """Whether the identity answers right, by its second verdict where it has one."""
        return self.verified.get(Program.identity(self.depth), self.baseline).correct

    @property
    def is_rescued(self) -> bool:
        """Whether some explored program is right where the identity is wrong; second verdicts
        count.
        """
        return not self.identity_correct and bool(self.valid)


def _software() -> dict[str, str]:
    versions = {"polar_fx": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # reading files takes neither
            continue
    return versions


@dataclass(frozen=True)
class SearchHeader:
    """What all records of a file share.

    `model` is the fingerprint of a model of `depth` layers; `task` and `prompt` say what was asked
    and how, as JSON values. A search goes on in a file only if these and `config` are the same;
    `software` and `created` are for people.
    """

    model: str
    depth: int
    config: SearchConfig
    task: Mapping[str, Any] = field(default_factory=dict)
    prompt: Mapping[str, Any] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=_software)
    created: str = ""
    """When the file was made, in UTC; filled in then."""


def encode_line(fields: Mapping[str, Any]) -> bytes:
    """One line: UTF-8 JSON, with the sha256 of the rest of it last.

    The sha256 is that of `json.dumps(rest, sort_keys=True, separators=(",", ":"))`, for anyone to
    check.
    """
    fields = {**fields, "sha256": digest(fields)}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Some tools take these for ends of lines; inside JSON they occur in strings only.
    text = text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair has no UTF-8, but an escape
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def decode_line(line: bytes, check: bool = True) -> dict[str, Any]:
    """The inverse of `encode_line`.

    Raises InputError if the line is not whole, or (if asked) was changed.
    """
    if not line.endswith(b"\n"):
        raise InputError("it ends within the line")
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start + 1} of the line is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError("it is not a JSON object")
    claimed = fields.pop("sha256", None)
    if check:
        try:
            actual = digest(fields)
        except (ValueError, RecursionError) as error:  # NaN, which JSON has not, but Python reads
            raise InputError(f"it is not JSON: {error}") from error
        if claimed != actual:
            raise InputError("it was changed since it was written: its sha256 does not fit")
    return fields


def header_to_fields(header: SearchHeader) -> dict[str, Any]:
    """The header as JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": header.model,
        "depth": header.depth,
        "config": asdict(header.config),
        "task": dict(header.task),
        "prompt": dict(header.prompt),
        "columns": list(COLUMNS),
        "created": header.created,
        "software": dict(header.software),
    }


def header_from_fields(fields: Mapping[str, Any]) -> SearchHeader:
    """The inverse of `header_to_fields`.

    Raises InputError naming what is missing or of another type.
    """
    columns = get(fields, "columns", kind=list)
    if tuple(columns) != COLUMNS:
        raise InputError(f"columns is {columns}, not {list(COLUMNS)}")
    return SearchHeader(
        get(fields, "model", kind=str),
        get(fields, "depth", kind=int),
        SearchConfig.from_dict(get(fields, "config", kind=dict)),
        get(fields, "task", kind=dict),
        get(fields, "prompt", kind=dict),
        get(fields, "software", kind=dict),
        get(fields, "created", kind=str),
    )


def record_to_fields(record: SearchRecord) -> dict[str, Any]:
    """The record as JSON values. The depth is left to the header, also in the text of programs."""
    question = record.question
    fields: dict[str, Any] = {
        "id": question.id,
        "task": question.task,
        "question": question.question,
        "answers": list(question.answers),
        "difficulty": question.difficulty,
        "cell": question.cell,
        "seed": record.seed,
        "seconds": _number(record.seconds),
        "baseline": _verdict_to_fields(record.baseline),
        "explored": [
            [
                _program_text(each.program),
                *_verdict_to_fields(each.verdict).values(),
                _number(each.reward),
            ]
            for each in record.explored
        ],
    }
    if question.choices:
        fields["choices"] = list(question.choices)
    if record.verified:
        fields["verified"] = {
            _program_text(program): _verdict_to_fields(each)
            for program, each in record.verified.items()
        }
    return fields


def record_from_fields(fields: Mapping[str, Any], depth: int) -> SearchRecord:
    """The inverse of `record_to_fields`.

    Raises InputError naming what is missing, of another type, or no program.
    """
    answers = get(fields, "answers", kind=list)
    choices = get(fields, "choices", kind=list) if "choices" in fields else []
    for name, texts in {"answers": answers, "choices": choices}.items():
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{name} is {texts!r}, not a list of texts")
    difficulty = None if fields.get("difficulty") is None else get(fields, "difficulty", kind=int)
    id, task, text, cell = (
        get(fields, name, kind=str) for name in ("id", "task", "question", "cell")
    )
    question = Question(id, task, text, tuple(answers), difficulty, cell, tuple(choices))
    explored = []
    for i, row in enumerate(get(fields, "explored", kind=list)):
        if not isinstance(row, list) or len(row) != len(COLUMNS):
            raise InputError(f"explored[{i}] is {row!r}, not a list of {', '.join(COLUMNS)}")
        named: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
        explored.append(
            Explored(_parse(row[0], depth), _verdict_from_fields(named), to_float(named, "reward"))
        )
    verified = get(fields, "verified", kind=dict) if "verified" in fields else {}
    return SearchRecord(
        question,
        depth,
        _verdict_from_fields(get(fields, "baseline", kind=dict)),
        tuple(explored),
        None if fields.get("seed") is None else get(fields, "seed", kind=int),
        None if fields.get("seconds") is None else to_float(fields, "seconds"),
        {_parse(text, depth): _verdict_from_fields(each) for text, each in verified.items()},
    )


def get(fields: Mapping[str, Any], name: str, *, kind: type) -> Any:
    """A field of a known type. Raises InputError."""
    if name not in fields:
        raise InputError(f"{name} is missing")
    value = fields[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name} is {shorten(value)}, not {_KINDS[kind]}")
    return value


_KINDS: Mapping[type, str] = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def to_float(fields: Mapping[str, Any], name: str) -> float:
    """A field that is a number. Raises InputError."""
    value = fields.get(name)
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name} is {shorten(value)}, not a number")
    return float(value)


def shorten(value: object) -> str:
    """A value as shown in messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(value: float | None) -> float | str | None:
    # Layers in another order can overflow; JSON has no such numbers, and a search must not end over
    # one.
    return None if value is None else float(value) if math.isfinite(value) else str(float(value))


def _verdict_to_fields(verdict: Verdict) -> dict[str, Any]:
    return {
        "correct": bool(verdict.correct),
        "log_likelihood": _number(verdict.log_likelihood),
        "margin": _number(verdict.margin),
    }


def _verdict_from_fields(fields: Mapping[str, Any]) -> Verdict:
    if not isinstance(fields, Mapping):
        raise InputError(f"{shorten(fields)} is not a verdict")
    scores = (
        None if fields.get(name) is None else to_float(fields, name)
        for name in ("log_likelihood", "margin")
    )
    return Verdict(get(fields, "correct", kind=bool), *scores)


def _program_text(program: Program) -> str:
    return str(program).rpartition(" /")[0]


@lru_cache(maxsize=1 << 16)  # most programs occur for many questions
def _parse_known(text: str, depth: int) -> Program:
    return Program.parse(text, depth)


def _parse(text: object, depth: int) -> Program:
    try:
        return _parse_known(text, depth)  # type: ignore[arg-type]
    except (ProgramError, TypeError) as error:
        raise InputError(f"{shorten(text)} is no program of {depth} layers: {error}") from error


def program_of_path(path: Sequence[int], depth: int) -> Program:
    """The program that runs `path`, taken from an imported file. Raises InputError."""
    try:
        return Program.from_path(path, depth)
    except (ProgramError, TypeError) as error:
        raise InputError(f"{shorten(path)} is no path of {depth} layers: {error}") from error

"""Search results of others, read and written: the files of the PoLar release and of RE-PoLar.

Both name theirs `merged_mcts_samples.json`: one object whose `samples` are rows, one a question,
that list programs as flat paths of layer numbers. Names ending in .gz are compressed. A file is
read whole, being one JSON value.

What neither layout can hold: log-likelihoods and margins, other rewards than right and wrong, a
question's seed and seconds, first verdicts where there are second ones, and damped programs, which
are refused. The depth is not in the files: the identity in them tells it.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import InputError, RecordFileError
from ...judge.verdict import Verdict
from ...output.files import replace_file
from ...program import Program
from ...questions.question import Question
from .records import Explored, SearchRecord, get, program_of_path, shorten

__all__ = ["export_official", "export_re_polar", "import_official", "import_re_polar"]

Row = Mapping[str, Any]
_NO_TEXT = "it has no question text"


def export_official(records: Iterable[SearchRecord], file: str | Path) -> None:
    """Write the layout of the PoLar release (tianyi-lab/PoLar:
    mcts_discovery/merge_mcts_samples.py, polar/data.py).

    Lost, beside what the module says: the order of exploration between right and wrong programs,
    all answers but the first, the task, the cell, and the difficulty unless it is the same for all.
    Raises InputError on a record that cannot be said, RecordFileError if the file cannot be
    written.
    """
    difficulties: set[int | None] = set()

    def row(index: int, record: SearchRecord) -> Row:
        question = record.question
        if not question.question or not question.answers:
            raise InputError("it has no question text or no answer, which the layout asks for")
        difficulties.add(question.difficulty)
        return {
            "sample_id": index,
            "global_idx": index,
            "query_id": question.id,
            "question": question.question,
            "gt_ans": question.answers[0],
            "initial_score": float(record.identity_correct),
            **_path_lists(record),
            "sample_info": {
                "question": question.question,
                "ground_truth": question.answers[0],
                "prompt_text": "",
            },
        }

    def rest() -> Row:
        level = difficulties.pop() if len(difficulties) == 1 else None
        return {} if level is None else {"DIFFICULTY_LEVEL": level}

    _write(Path(file), records, convert=row, rest=rest)


def import_official(
    file: str | Path, *, depth: int | None = None, task: str = "dart-math"
) -> Iterator[SearchRecord]:
    """The rows of a file of the PoLar release, or of its older layouts, as records.

    Known are the variants that polar/data.py reads: `samples` as a list, or the rows as values of
    an object; questions and answers in `sample_info`; paths as lists or as objects with a `path`.
    Right programs come first, then wrong ones, each in the file's order. Ids are `query_id`, or
    else the row's number. Raises InputError naming the file, the row and what is wrong with it,
    RecordFileError if the file cannot be read.
    """

    def record(row: Row, index: int, depth: int, level: int | None) -> SearchRecord:
        info = get(row, "sample_info", kind=dict) if row.get("sample_info") else {}
        text = _first(row.get("question"), info.get("question"))
        answer = _first(
            row.get("gt_ans"),
            row.get("ground_truth"),
            row.get("answer"),
            info.get("ground_truth"),
            info.get("answer"),
        )
        if not isinstance(text, str):
            raise InputError(
                _NO_TEXT if text is None else f"question is {shorten(text)}, not a text"
            )
        name = _first(row.get("query_id"), row.get("sample_id"), index)
        question = Question(str(name), task, text, _answers(answer), level)
        inner = row.get("evaluation_result")
        nested = inner.get("initial_score") if isinstance(inner, Mapping) else None
        score = _first(row.get("initial_transition_metric"), row.get("initial_score"), nested)
        verdicts = _listed(row)
        right = _baseline(score, verdicts, depth=depth)
        return _record(question, depth, baseline=right, verdicts=verdicts, order=list(verdicts))

    return _records(Path(file), depth, convert=record)


def export_re_polar(records: Iterable[SearchRecord], file: str | Path) -> None:
    """Write the layout of RE-PoLar (DATEXIS/RE-PoLar: data/DATA.md, re_polar/datasets/schemas.py).

    `search_trajectory` holds the explored programs in order, with right or wrong as reward, and
    null as `parent_path`: a record keeps no tree. `sample_info`, free-form there, also takes the
    task, the cell and all answers. Raises as `export_official`, but writes rows without text, as
    those of the release are.
    """

    def row(_: int, record: SearchRecord) -> Row:
        question, right = record.question, set(record.valid)
        text = (
            {"question": question.question, "gt_ans": _gt_ans(question)}
            if question.question
            else {}
        )
        info = {
            "query_id": question.id,
            "difficulty": question.difficulty,
            "task": question.task,
            "cell": question.cell,
            "answers": list(question.answers),
        }
        return {
            **text,
            **_path_lists(record),
            "initial_transition_metric": float(record.identity_correct),
            "sample_info": info,
            "search_trajectory": [
                {
                    "path": list(each.program.path),
                    "parent_path": None,
                    "reward": float(each.program in right),
                }
                for each in record.explored
            ],
        }

    _write(Path(file), records, convert=row, rest=dict)


def import_re_polar(
    file: str | Path,
    *,
    depth: int | None = None,
    task: str = "dart-math",
    questions: Mapping[str, Question] | None = None,
    without_text: bool = False,
) -> Iterator[SearchRecord]:
    """The rows of a file of RE-PoLar as records.

    The released rows have neither question nor answer: give `questions` by id
    (`sample_info.query_id`), which then take the place of the file's; or say `without_text`, and
    both stay empty. The order is that of `search_trajectory`; its further visits of a program and
    its entries of no layer (all skipped) are left out. `domain` becomes the cell; the rest of
    `sample_info` is dropped. The questions of its MMLU-Pro runs, objects with options, are refused.
    Raises as `import_official`.
    """

    def record(row: Row, index: int, depth: int, _: int | None) -> SearchRecord:
        info = get(row, "sample_info", kind=dict)
        name = get(info, "query_id", kind=str)
        verdicts = _listed(row)
        order = list(_visited(row, verdicts)) if row.get("search_trajectory") is not None else []
        # The lists also hold what was evaluated before the search, and all there is in files
        # without a trajectory.
        visited = set(order)
        order += [path for path in verdicts if path not in visited]
        score = _baseline(row.get("initial_transition_metric"), verdicts, depth=depth)
        return _record(
            _question(row, info, name=name), depth, baseline=score, verdicts=verdicts, order=order
        )

    def _question(row: Row, info: Row, *, name: str) -> Question:
        if questions is not None and name in questions:
            return questions[name]
        level = None if info.get("difficulty") is None else get(info, "difficulty", kind=int)
        if row.get("question") is None:
            if not without_text:
                raise InputError(
                    f"{_NO_TEXT}, as in the release; give questions, or say without_text=True"
                )
            text, answers = "", ()
        else:
            text, answers = get(row, "question", kind=str), _answers(row.get("gt_ans"))
        own = info.get("answers")
        if isinstance(own, list) and all(isinstance(each, str) for each in own):
            answers = tuple(own)
        cell = _first(info.get("cell"), info.get("domain"), "")
        return Question(name, str(_first(info.get("task"), task)), text, answers, level, str(cell))

    return _records(Path(file), depth, convert=record)


# Rows to records


def _listed(row: Row) -> dict[tuple[int, ...], bool]:
    """The paths of both lists, with whether they answer right. Raises InputError."""
    found: dict[tuple[int, ...], bool] = {}
    for name, correct in (("final_valid_transitions", True), ("final_invalid_transitions", False)):
        # the official reader asks for the valid ones only
        if not correct and row.get(name) is None:
            continue
        for i, each in enumerate(get(row, name, kind=list)):
            path = _path(each, f"{name}[{i}]")
            if found.setdefault(path, correct) is not correct:
                raise InputError(f"{name}[{i}] is among the valid paths as well")
    return found


def _visited(row: Row, verdicts: dict[tuple[int, ...], bool]) -> Iterator[tuple[int, ...]]:
    """The paths of the trajectory, each once; adds those that `verdicts` lacks.

    Raises InputError.
    """
    seen = set()
    for i, visit in enumerate(get(row, "search_trajectory", kind=list)):
        where = f"search_trajectory[{i}]"
        if not isinstance(visit, Mapping):
            raise InputError(f"{where} is {shorten(visit)}, not an object")
        if visit.get("path") == []:
            continue
        path = _path(visit.get("path"), f"{where}.path")
        correct = _score(visit.get("reward"), f"{where}.reward")
        if verdicts.setdefault(path, correct) is not correct:
            raise InputError(f"{where}.reward contradicts the list its path is in")
        if path not in seen:
            seen.add(path)
            yield path


def _baseline(score: object, verdicts: Mapping[tuple[int, ...], bool], *, depth: int) -> bool:
    """Whether the identity answers right, as the row's score says, or else the list it is in.

    Raises InputError.
    """
    listed = verdicts.get(tuple(range(depth)))
    if score is None and listed is not None:
        return listed
    correct = _score(score, "the score of the identity")
    if listed is not None and listed is not correct:
        raise InputError("the score of the identity contradicts the list it is in")
    return correct


def _record(
    question: Question,
    depth: int,
    *,
    baseline: bool,
    verdicts: Mapping[tuple[int, ...], bool],
    order: Iterable[tuple[int, ...]],
) -> SearchRecord:
    identity = tuple(range(depth))
    explored = [
        Explored(program_of_path(path, depth), Verdict(verdicts[path]), float(verdicts[path]))
        for path in order
        if path != identity
    ]
    return SearchRecord(question, depth, Verdict(baseline), tuple(explored))


def _path(value: object, where: str) -> tuple[int, ...]:
    if isinstance(value, Mapping):
        value = value.get("path")
    if (
        not isinstance(value, list)
        or not value
        or not all(type(layer) is int and layer >= 0 for layer in value)
    ):
        raise InputError(f"{where} is {shorten(value)}, not a list of layer numbers")
    return tuple(value)


def _score(value: object, name: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in (0, 1):
        raise InputError(f"{name} is {shorten(value)}, neither 0 nor 1")
    return value == 1


def _answers(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(f"the answer is {shorten(value)}, not a text or number")
    return (str(value),)


def _first(*values: Any) -> Any:
    """The first that is there; the official reader takes an empty text for none."""
    return next((value for value in values if value is not None and value != ""), None)


def _records(
    file: Path, depth: int | None, *, convert: Callable[[Row, int, int, int | None], SearchRecord]
) -> Iterator[SearchRecord]:
    data = _read(file)
    rows = data.get("samples", list(data.values())) if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise InputError(f"{file}: samples is {shorten(rows)}, not a list of rows")
    level = data.get("DIFFICULTY_LEVEL") if isinstance(data, dict) else None
    level = level if type(level) is int else None
    found: dict[str, int] = {}
    if depth is None and rows:
        depth = _depth(file, rows)
    for index, row in enumerate(rows):
        with _naming(file, index):
            record = convert(_object(row), index, depth or 0, level)
            first = found.setdefault(record.question.id, index)
            if first != index:
                raise InputError(f"it repeats question {record.question.id!r} of row {first}")
        yield record


@contextmanager
def _naming(file: Path, index: int) -> Iterator[None]:
    """Put file and row in front of what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}, row {index}: {error}") from error


def _object(row: object) -> Row:
    if not isinstance(row, Mapping):
        raise InputError(f"it is {shorten(row)}, not an object")
    return row


def _depth(file: Path, rows: list[Any]) -> int:
    """The identity runs on every question, so it is in some row, and no path has a later layer.

    Raises InputError.
    """
    depth, last = 0, 0
    for index, row in enumerate(rows):
        with _naming(file, index):
            for path in _listed(_object(row)):
                last = max(last, *path)
                if len(path) > depth and path == tuple(range(len(path))):
                    depth = len(path)
    if depth != last + 1:
        raise InputError(f"{file}: no path is the identity, which tells the depth; give depth")
    return depth


# Records to rows


def _path_lists(record: SearchRecord) -> Row:
    """Both lists, with the identity first in the one it belongs to."""
    lists: dict[bool, list[list[int]]] = {True: [], False: []}
    baseline = Explored(Program.identity(record.depth), record.baseline, 0.0)
    right = {*record.valid, *([baseline.program] if record.identity_correct else [])}
    for each in (baseline, *record.explored):
        if each.program.blends:
            raise InputError(f"program {each.program} is damped, which a list of layers cannot say")
        lists[each.program in right].append(list(each.program.path))
    return {"final_valid_transitions": lists[True], "final_invalid_transitions": lists[False]}


def _gt_ans(question: Question) -> str | None:
    return question.answers[0] if question.answers else None


# Files


def _write(
    file: Path,
    records: Iterable[SearchRecord],
    *,
    convert: Callable[[int, SearchRecord], Row],
    rest: Callable[[], Row],
) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"samples": ['
        for index, record in enumerate(records):
            try:
                row = convert(index, record)
            except InputError as error:
                raise InputError(
                    f"question {record.question.id!r} cannot be written to {file}: {error}"
                ) from error
            yield (b",\n" if index else b"\n") + _dump(row)
        yield (
            b"\n]"
            + b"".join(
                b",\n" + _dump(name) + b": " + _dump(value) for name, value in rest().items()
            )
            + b"}\n"
        )

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, _compress(parts()) if file.suffix == ".gz" else parts())
    except OSError as error:
        raise RecordFileError(
            str(file), error.strerror or str(error), remedy="name a file that can be written"
        ) from error


def _dump(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value).encode()


def _compress(parts: Iterable[bytes]) -> Iterator[bytes]:
    # 31: gzip, without name and time, so equal records give equal files
    packer = zlib.compressobj(wbits=31)
    for part in parts:
        yield packer.compress(part)
    yield packer.flush()


def _read(file: Path) -> Any:
    try:
        content = file.read_bytes()
        if content.startswith(b"version https://git-lfs"):
            raise InputError(
                f"{file} is a Git LFS pointer, not the data; run git lfs pull where it came from"
            )
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise RecordFileError(
            str(file), error.strerror or str(error), remedy="name a file that can be read"
        ) from error
    try:
        data = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start + 1}); convert it") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, (dict, list)):
        raise InputError(f"{file} holds {shorten(data)}, not rows")
    return data

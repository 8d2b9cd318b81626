"""Files of the PoLar release and of RE-PoLar, read and written."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_fx.errors import InputError, RecordFileError
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions.question import Question
from polar_fx.search.records.formats import (
    export_official,
    export_re_polar,
    import_official,
    import_re_polar,
)
from polar_fx.search.records.records import Explored, SearchRecord

DEPTH = 4
IDENTITY, SKIPPED, REPEATED, NESTED = [0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 1, 2, 3], [0, 1, 1, 0, 3]


def _record(question: Question, baseline: bool, **found: bool) -> SearchRecord:
    paths = {"skipped": SKIPPED, "repeated": REPEATED, "nested": NESTED}
    explored = (
        Explored(Program.from_path(paths[name], DEPTH), Verdict(correct), float(correct))
        for name, correct in found.items()
    )
    return SearchRecord(question, DEPTH, Verdict(baseline), tuple(explored))


ONE = _record(
    Question("math/1", "dart-math", "Wie groß ist 1 + 1?", ("2",), 3),
    False,
    repeated=True,
    skipped=False,
)
TWO = _record(
    Question("math/2", "dart-math", "$\\frac{1}{2}$ → ?", ("\\frac12",), 3), True, nested=True
)


def _write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "merged_mcts_samples.json"


# The PoLar release


def test_the_official_layout_is_what_its_merge_writes(file: Path) -> None:
    export_official([ONE, TWO], file)
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["DIFFICULTY_LEVEL"] == 3 and len(data["samples"]) == 2
    assert data["samples"][0] == {
        "sample_id": 0,
        "global_idx": 0,
        "query_id": "math/1",
        "question": "Wie groß ist 1 + 1?",
        "gt_ans": "2",
        "initial_score": 0.0,
        "final_valid_transitions": [REPEATED],
        "final_invalid_transitions": [IDENTITY, SKIPPED],
        "sample_info": {"question": "Wie groß ist 1 + 1?", "ground_truth": "2", "prompt_text": ""},
    }
    assert (
        data["samples"][1]["final_valid_transitions"] == [IDENTITY, NESTED]
        and data["samples"][1]["initial_score"] == 1.0
    )
    assert "groß" in file.read_text(encoding="utf-8")
    assert list(import_official(file)) == [ONE, TWO]


@pytest.mark.parametrize(
    "layout",
    ["values", "list", "path objects", "sample_info", "evaluation_result", "no score", "no ids"],
)
def test_older_official_layouts_are_read(layout: str, file: Path) -> None:
    export_official([ONE, TWO], file)
    data = json.loads(file.read_text(encoding="utf-8"))
    rows = data["samples"]
    for row in rows:
        if layout == "path objects":
            row["final_valid_transitions"] = [
                {"path": path, "score": 1.0} for path in row["final_valid_transitions"]
            ]
        elif layout == "sample_info":
            del row["question"], row["gt_ans"]
        elif layout == "evaluation_result":
            row["evaluation_result"] = {"initial_score": row.pop("initial_score")}
        elif layout == "no score":
            del row["initial_score"]
        elif layout == "no ids":
            del row["query_id"], row["sample_id"]
    if layout in ("values", "list"):
        data = {str(i): row for i, row in enumerate(rows)} if layout == "values" else rows
    found = list(import_official(_write(file, data), task="other"))
    for read, wanted in zip(found, (ONE, TWO), strict=True):
        assert (read.baseline, read.explored) == (wanted.baseline, wanted.explored)
        assert read.question.question == wanted.question.question
    assert [r.question.id for r in found] == (
        ["0", "1"] if layout == "no ids" else ["math/1", "math/2"]
    )
    assert {(r.question.task, r.question.difficulty) for r in found} == {
        ("other", None if layout in ("values", "list") else 3)
    }


# RE-PoLar


def test_the_re_polar_layout_is_what_its_data_page_says(file: Path) -> None:
    question = Question("q", "arithmetic", "1 + 1?", ("2", "2.0"), 1, "1x1")
    record = _record(question, False, skipped=False, repeated=True)
    export_re_polar([record], file)
    (row,) = json.loads(file.read_text(encoding="utf-8"))["samples"]
    assert row == {
        "question": "1 + 1?",
        "gt_ans": "2",
        "final_valid_transitions": [REPEATED],
        "final_invalid_transitions": [IDENTITY, SKIPPED],
        "initial_transition_metric": 0.0,
        "sample_info": {
            "query_id": "q",
            "difficulty": 1,
            "task": "arithmetic",
            "cell": "1x1",
            "answers": ["2", "2.0"],
        },
        "search_trajectory": [
            {"path": SKIPPED, "parent_path": None, "reward": 0.0},
            {"path": REPEATED, "parent_path": None, "reward": 1.0},
        ],
    }
    assert list(import_re_polar(file)) == [record]


# A row as released, with fewer layers: no text; the identity among the paths, not in the
# trajectory; a program visited twice.
RELEASED: dict[str, Any] = {
    "final_valid_transitions": [SKIPPED, REPEATED],
    "final_invalid_transitions": [IDENTITY, [0, 1]],
    "initial_transition_metric": 0.0,
    "sample_info": {
        "query_id": "grade-school-math/train.jsonl:1649",
        "domain": "Prealgebra",
        "math_level": None,
        "source": "gsm8k",
        "fail_rate": 0.0042918454935622075,
        "tot_n_samples": 233,
        "difficulty": 1,
    },
    "search_trajectory": [
        {"path": REPEATED, "parent_path": IDENTITY, "reward": 1.0},
        {"path": [0, 1], "parent_path": IDENTITY, "reward": 0.0},
        {"path": [], "parent_path": [0, 1], "reward": 0.0},
        {"path": REPEATED, "parent_path": IDENTITY, "reward": 1.0},
        {"path": SKIPPED, "parent_path": IDENTITY, "reward": 1.0},
    ],
}


def test_released_rows_of_re_polar_are_read(file: Path) -> None:
    packed = file.with_suffix(".json.gz")
    packed.write_bytes(gzip.compress(json.dumps({"samples": [RELEASED]}).encode()))
    (record,) = import_re_polar(packed, without_text=True)
    name = "grade-school-math/train.jsonl:1649"
    assert record.question == Question(name, "dart-math", "", (), 1, "Prealgebra")
    assert [list(each.program.path) for each in record.explored] == [REPEATED, [0, 1], SKIPPED]
    assert (
        [each.reward for each in record.explored] == [1.0, 0.0, 1.0]
        and record.is_rescued
        and record.seed is None
    )
    with pytest.raises(
        InputError,
        match="json.gz, row 0: it has no question text, as in the release; give questions, or say",
    ):
        list(import_re_polar(packed))
    question = Question(name, "dart-math", "How many?", ("25",), 1)
    assert next(import_re_polar(packed, questions={name: question})).question == question


def test_rows_without_text_are_written_as_released(file: Path) -> None:
    (record,) = import_re_polar(_write(file, {"samples": [RELEASED]}), without_text=True)
    again = file.with_name("again.json.gz")
    export_re_polar([record], again)
    assert (
        not {"question", "gt_ans"}
        & json.loads(gzip.decompress(again.read_bytes()))["samples"][0].keys()
    )
    assert list(import_re_polar(again, without_text=True)) == [record]
    first = again.read_bytes()
    export_re_polar([record], again)
    assert again.read_bytes() == first


def test_rows_without_a_trajectory_are_read(file: Path) -> None:
    row = {name: value for name, value in RELEASED.items() if name != "search_trajectory"}
    (record,) = import_re_polar(_write(file, {"samples": [{**row, "question": "?", "gt_ans": 7}]}))
    assert [list(each.program.path) for each in record.explored] == [SKIPPED, REPEATED, [0, 1]]
    assert record.question.answers == ("7",)


# Both

TEXTS = st.text(st.characters(exclude_categories=()), min_size=1, max_size=20)
PATHS = (
    st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=9)
    .map(tuple)
    .filter(lambda path: list(path) != IDENTITY)
)


@st.composite
def records(draw: st.DrawFn) -> SearchRecord:
    found = draw(
        st.lists(st.tuples(PATHS, st.booleans()), max_size=6, unique_by=lambda each: each[0])
    )
    explored = (
        Explored(Program.from_path(path, DEPTH), Verdict(correct), float(correct))
        for path, correct in found
    )
    level = draw(st.none() | st.integers(1, 5))
    question = Question(
        draw(TEXTS),
        draw(TEXTS),
        draw(TEXTS),
        tuple(draw(st.lists(TEXTS, min_size=1, max_size=3))),
        level,
        draw(TEXTS),
    )
    return SearchRecord(question, DEPTH, Verdict(draw(st.booleans())), tuple(explored))


def test_second_verdicts_are_those_written(file: Path) -> None:
    again = {ONE.explored[0].program: Verdict(False), Program.identity(DEPTH): Verdict(True)}
    found = replace(ONE, verified=again)
    for export, read in ((export_official, import_official), (export_re_polar, import_re_polar)):
        export([found], file)
        (record,) = read(file)
        assert (
            record.baseline.correct
            and not record.valid
            and len(record.explored) == len(ONE.explored)
        )


RECORDS = st.lists(records(), min_size=1, max_size=4, unique_by=lambda record: record.question.id)


@given(RECORDS)
@settings(max_examples=60)
def test_re_polar_rows_read_back(
    tmp_path_factory: pytest.TempPathFactory, found: list[SearchRecord]
) -> None:
    file = tmp_path_factory.getbasetemp() / "round_trip.json"
    export_re_polar(iter(found), file)
    assert list(import_re_polar(file)) == found


@given(RECORDS)
@settings(max_examples=60)
def test_official_rows_read_back_in_all_they_can_hold(
    tmp_path_factory: pytest.TempPathFactory, found: list[SearchRecord]
) -> None:
    file = tmp_path_factory.getbasetemp() / "round_trip.json"
    export_official(iter(found), file)
    again = list(import_official(file))
    same_level = len({record.question.difficulty for record in found}) == 1
    for old, new in zip(found, again, strict=True):
        level = old.question.difficulty if same_level else None
        assert new.question == Question(
            old.question.id, "dart-math", old.question.question, old.question.answers[:1], level
        )
        assert new.baseline == old.baseline
        assert new.explored == tuple(
            sorted(old.explored, key=lambda each: not each.verdict.correct)
        )


def _with(**changes: Any) -> dict[str, Any]:
    """A row that is right, then one with these changes."""
    row = {**RELEASED, "question": "?", "gt_ans": "1", "query_id": "1"}
    return {
        "samples": [
            {**row, "sample_info": {"query_id": "0"}, "query_id": "0", "search_trajectory": []},
            {**row, **changes},
        ]
    }


LISTED, NO_PATH = "final_invalid_transitions", "not a list of layer numbers"


@pytest.mark.parametrize("read", [import_official, import_re_polar])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "holds 'text', not rows"),
        ({"samples": 5}, "samples is 5, not a list of rows"),
        ({"samples": [5]}, "row 0: it is 5, not an object"),
        ({"samples": [{}]}, "row 0: final_valid_transitions is missing"),
        (_with(final_valid_transitions=7), "row 1: final_valid_transitions is 7, not a list"),
        (
            _with(**{LISTED: [IDENTITY, [0, "1"]]}),
            rf"row 1: {LISTED}\[1\] is \[0, '1'\], {NO_PATH}",
        ),
        (_with(**{LISTED: [IDENTITY, [True]]}), rf"\[1\] is \[True\], {NO_PATH}"),
        (_with(**{LISTED: [IDENTITY, [0, -1]]}), rf"\[1\] is \[0, -1\], {NO_PATH}"),
        (_with(**{LISTED: [IDENTITY, []]}), rf"\[1\] is \[\], {NO_PATH}"),
        (
            _with(**{LISTED: [IDENTITY, SKIPPED]}),
            rf"{LISTED}\[1\] is among the valid paths as well",
        ),
        (_with(initial_transition_metric=0.5), "the score of the identity is 0.5, neither 0 nor 1"),
        (
            _with(initial_transition_metric=1.0),
            "the score of the identity contradicts the list it is in",
        ),
        (
            _with(question={"question": "?", "options": []}),
            "row 1: question is {'question': .*, not a text",
        ),
        (_with(gt_ans=["1"]), r"row 1: the answer is \['1'\], not a text or number"),
        (_with(sample_info=3), "row 1: sample_info is 3, not an object"),
        (
            _with(final_valid_transitions=[[0, 1, 9]]),
            "json: no path is the identity, which tells the depth; give depth",
        ),
        (
            _with(query_id="0", sample_info={"query_id": "0"}),
            "row 1: it repeats question '0' of row 0",
        ),
    ],
)
def test_rows_that_are_wrong_are_named(
    data: object, message: str, read: Callable[[Path], Iterator[SearchRecord]], file: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        list(read(_write(file, data)))
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("visit", "message"),
    [
        (5, r"search_trajectory\[0\] is 5, not an object"),
        (
            {"path": None, "reward": 1.0},
            r"search_trajectory\[0\].path is None, not a list of layer numbers",
        ),
        (
            {"path": SKIPPED, "reward": "1"},
            r"search_trajectory\[0\].reward is '1', neither 0 nor 1",
        ),
        (
            {"path": SKIPPED, "reward": 0.0},
            r"search_trajectory\[0\].reward contradicts the list its path is in",
        ),
        ({"path": [0, 9], "reward": 0.0}, r"\(0, 9\) is no path of 4 layers"),
    ],
)
def test_trajectories_that_are_wrong_are_named(visit: object, message: str, file: Path) -> None:
    row = {**RELEASED, "search_trajectory": [visit]}
    with pytest.raises(InputError, match=f"row 0: {message}"):
        list(import_re_polar(_write(file, {"samples": [row]}), without_text=True))


def test_a_depth_that_is_given_holds(file: Path) -> None:
    row = {"question": "?", "gt_ans": "1", "initial_score": 0, "final_valid_transitions": [[0, 2]]}
    (record,) = import_official(_write(file, [row]), depth=3)
    assert (
        record.explored[0].program == Program.from_path([0, 2], 3) and not record.baseline.correct
    )
    with pytest.raises(InputError, match=r"row 0: \(0, 2\) is no path of 2 layers"):
        list(import_official(file, depth=2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, not the data; run git lfs pull",
        ),
        ('{"samples": "ü"}'.encode("latin-1"), "is not UTF-8 .byte 14.; convert it"),
        ('{"samples": []}'.encode("utf-16"), "is not UTF-8 .byte 1."),
        (b'{"samples": [', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_files_that_are_wrong_are_named(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"merged_mcts_samples.json {message}"):
        list(import_official(file))
    packed = file.with_suffix(".json.gz")
    packed.write_bytes(gzip.compress(b"[]" * 1000)[:-9])
    with pytest.raises(InputError, match="is not a whole gzip file"):
        list(import_re_polar(packed))


def test_a_failed_export_leaves_the_old_file(file: Path) -> None:
    export_official([ONE], file)
    before = file.read_bytes()
    damped = Program.identity(DEPTH).repeat(1, 1, 2, 0.5)
    wrong = SearchRecord(
        ONE.question, DEPTH, Verdict(True), (Explored(damped, Verdict(True), 1.0),)
    )
    for export in (export_official, export_re_polar):
        with pytest.raises(
            InputError,
            match=r"question 'math/1' cannot be written to .*: program .* is damped, which a list",
        ):
            export([TWO, wrong], file)
    silent = SearchRecord(Question("q", "", "", ()), DEPTH, Verdict(True), ())
    with pytest.raises(
        InputError,
        match="question 'q' cannot be written to .*: it has no question text or no answer",
    ):
        export_official([silent], file)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
    with pytest.raises(RecordFileError, match="name a file that can be written"):
        export_official([ONE], file / "inner.json")
    with pytest.raises(RecordFileError, match="No such file.*; name a file that can be read"):
        list(import_official(file.with_name("none.json")))


def test_an_empty_file_has_no_rows(file: Path) -> None:
    export_official([], file)
    assert list(import_official(file)) == [] and json.loads(file.read_text(encoding="utf-8")) == {
        "samples": []
    }

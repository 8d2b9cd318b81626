"""One search record, and its form as a line of JSON."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_fx.errors import InputError
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Blend, Program
from polar_fx.questions.question import Question
from polar_fx.search.config import SearchConfig
from polar_fx.search.records.record_file import RecordStore
from polar_fx.search.records.records import (
    Explored,
    SearchHeader,
    SearchRecord,
    decode_line,
    encode_line,
    record_from_fields,
    record_to_fields,
)
from search_store_worker import DEPTH, HEADER, record

IDENTITY = Program.identity(DEPTH)

SCORES = st.none() | st.floats(allow_nan=False)
VERDICTS = st.builds(Verdict, st.booleans(), SCORES, SCORES)
# line separators and half surrogate pairs as well
TEXTS = st.text(st.characters(exclude_categories=()), max_size=30)
QUESTIONS = st.builds(
    Question,
    TEXTS,
    TEXTS,
    TEXTS,
    st.lists(TEXTS, max_size=3).map(tuple),
    st.none() | st.integers(1, 5),
    TEXTS,
    st.lists(TEXTS, max_size=3).map(tuple),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    path = draw(st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=10))
    damping = draw(st.sampled_from([None, 0.5, 0.1, 1e-05]))
    return Program(DEPTH, tuple(path), () if damping is None else (Blend(0, len(path), damping),))


@st.composite
def records(draw: st.DrawFn) -> SearchRecord:
    found = draw(st.lists(programs(), max_size=5, unique=True))
    explored = [Explored(p, draw(VERDICTS), draw(st.floats(0, 1))) for p in found if p != IDENTITY]
    verified = draw(st.dictionaries(st.sampled_from([IDENTITY, *found]), VERDICTS, max_size=2))
    seed, seconds = draw(st.none() | st.integers(0, 2**64 - 1)), draw(st.none() | st.floats(0, 1e6))
    return SearchRecord(
        draw(QUESTIONS), DEPTH, draw(VERDICTS), tuple(explored), seed, seconds, verified
    )


@given(records())
@settings(max_examples=200)
def test_a_record_reads_back_from_its_line(each: SearchRecord) -> None:
    line = encode_line(record_to_fields(each))
    # one line, also for those who split at U+2028
    assert line.decode().splitlines(keepends=True) == [line.decode()]
    assert record_from_fields(decode_line(line), DEPTH) == each


@given(records(), st.data())
@settings(max_examples=100)
def test_no_changed_byte_goes_unseen(each: SearchRecord, data: st.DataObject) -> None:
    line = encode_line(record_to_fields(each))
    position = data.draw(st.integers(0, len(line) - 1))
    changed = (
        line[:position]
        + bytes([line[position] ^ 1 << data.draw(st.integers(0, 6))])
        + line[position + 1 :]
    )
    try:
        fields = decode_line(changed)
    except InputError:
        return
    assert fields == decode_line(line)  # such as a space for the end of the line


def test_a_line_can_be_read_and_checked_by_anyone(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    with RecordStore.open(path, HEADER) as store:
        store.append(record(3))
    header, fields = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert (
        header["format"] == "polar_fx.search"
        and header["version"] == 1
        and header["depth"] == DEPTH
    )
    assert header["software"]["python"] and header["created"].endswith("+00:00")
    assert fields["question"] == "3 · 2 = ?" and "3 · 2 = ?" in path.read_text(encoding="utf-8")
    row = dict(zip(header["columns"], fields["explored"][0], strict=True))
    assert (
        Program.parse(row["program"], DEPTH) == record(3).explored[0].program
        and "/" not in row["program"]
    )
    sha256 = fields.pop("sha256")
    assert (
        sha256
        == hashlib.sha256(
            json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_json_has_not_do_not_end_a_search(value: float) -> None:
    explored = Explored(IDENTITY.skip(1), Verdict(False, value, value), 0.0)
    line = encode_line(record_to_fields(dataclasses.replace(record(0), explored=(explored,))))
    assert repr(record_from_fields(decode_line(line), DEPTH).explored[0]) == repr(explored)
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("explored", "message"),
    [
        ([IDENTITY], "the identity is among the explored"),
        ([IDENTITY.skip(1), IDENTITY.skip(1)], r"program 0 2-5 /6 was explored twice"),
        ([Program.identity(5)], r"program 0-4 /5 has depth 5, not 6"),
    ],
)
def test_a_record_holds_each_program_once(explored: list[Program], message: str) -> None:
    with pytest.raises(InputError, match=f"question 'q1'.*{message}"):
        dataclasses.replace(
            record(1), explored=tuple(Explored(p, Verdict(False), 0.0) for p in explored)
        )


def test_a_record_tells_what_was_valid_and_rescued() -> None:
    explored = (
        Explored(IDENTITY.skip(1), Verdict(True), 1.0),
        Explored(IDENTITY.skip(2), Verdict(False), 0.0),
    )
    wrong = dataclasses.replace(record(0), baseline=Verdict(False), explored=explored)
    assert wrong.valid == (IDENTITY.skip(1),) and wrong.is_rescued
    assert not dataclasses.replace(wrong, baseline=Verdict(True)).is_rescued and hash(
        wrong
    ) == hash(wrong)


def test_second_verdicts_count() -> None:
    one, other, third = IDENTITY.skip(1), IDENTITY.skip(2), IDENTITY.skip(3)
    verdicts = {one: Verdict(True), other: Verdict(True), third: Verdict(False)}
    found = dataclasses.replace(
        record(0),
        baseline=Verdict(True),
        explored=tuple(Explored(p, v, 0.0) for p, v in verdicts.items()),
        verified={other: Verdict(False), IDENTITY: Verdict(False), third: Verdict(True)},
    )
    assert found.valid == (one, third) and not found.identity_correct and found.is_rescued
    assert found.verdicts == {IDENTITY: Verdict(True), **verdicts}, "the first ones are kept"
    assert not dataclasses.replace(found, explored=found.explored[1:2]).is_rescued


def test_headers_name_the_software() -> None:
    assert {"polar_fx", "python", "torch", "transformers"} <= SearchHeader(
        "", 1, SearchConfig()
    ).software.keys()

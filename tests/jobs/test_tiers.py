"""Questions in tiers: which enter which split, and what is left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from polar_fx.errors import InputError
from polar_fx.jobs.questions import own_split
from polar_fx.jobs.tiers import read_tiers
from polar_fx.questions import load_jsonl


def rows(split: str, *, count: int = 8, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{split}-{i}",
            "question": f"{split} {i}?",
            "answer": str(i),
            "split": split,
            "tier": 1 + i % 2,
            **more,
        }
        for i in range(count)
    ]


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tiers_are_tasks_and_come_in_turns(tmp_path: Path) -> None:
    ordered = sorted(rows("train"), key=lambda row: row["tier"])
    data = written(tmp_path / "a.jsonl", [*ordered, *rows("val"), *rows("test")])
    found = read_tiers([data])
    train = [q.task for q in found.questions if own_split(q) == "train"]
    assert train == ["tier 1", "tier 2"] * 4
    assert found.there == {"train": 8, "validation": 8, "test": 8} and not found.is_divided
    again = load_jsonl(found.write(tmp_path / "questions.jsonl"))
    assert tuple(again) == found.questions, "what is written is what is asked"
    assert read_tiers([data]) == found
    assert read_tiers([data], seed=1).questions != found.questions


def test_other_names_of_splits_are_known_and_unknown_ones_refused(tmp_path: Path) -> None:
    lines = [*rows("train"), *rows("dev"), *rows("Test")]
    found = read_tiers([written(tmp_path / "a.jsonl", lines)])
    assert found.there == {"train": 8, "validation": 8, "test": 8}
    strange = written(tmp_path / "b.jsonl", [*rows("train"), *rows("exam")])
    with pytest.raises(InputError, match="line 9: its split is 'exam'; name train, validation or"):
        read_tiers([strange])


def test_ids_to_leave_out_that_are_of_other_data_are_refused(tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("gsm8k:1\n")
    data = written(tmp_path / "a.jsonl", [*rows("train"), *rows("val")])
    with pytest.raises(InputError, match="none of the 1 ids to leave out, such as 'gsm8k:1', is"):
        read_tiers([data], ids)


def test_without_test_questions_half_of_validation_is_kept_for_it(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", rows("train"))
    found = read_tiers([train, written(tmp_path / "val.jsonl", rows("val"))])
    assert found.is_divided and found.there == {"train": 8, "validation": 4, "test": 4}
    tiers = found.facts()["tiers"]
    assert tiers["tier 1"] == tiers["tier 2"] == {"train": 4, "validation": 2, "test": 2}


def test_ids_to_leave_out_and_repeated_texts_do_not_enter_training(tmp_path: Path) -> None:
    lines = [*rows("train"), *rows("val")]
    lines[5]["question"] = lines[8]["question"]
    ids = tmp_path / "ids.txt"
    ids.write_text("train-1\ntrain-2\n\nval-3\nelsewhere\n")
    found = read_tiers([written(tmp_path / "a.jsonl", lines)], ids)
    left = {q.id for q in found.questions if own_split(q) == "train"}
    assert left == {"train-0", "train-3", "train-4", "train-6", "train-7"}
    assert any(q.id == "val-3" for q in found.questions), "only training is kept from it"
    assert (found.named, found.left_out, found.repeated) == (4, 2, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tier": None}, "line 1: its tier is None"),
        ({"tier": True}, "line 1: its tier is True"),
        ({"tier": " "}, "line 1: its tier is ' '"),
        ({"choices": ["0", "1"]}, "line 1: it has choices"),
        ({"id": "val-0"}, "two lines of the data have the id 'val-0'"),
        ({"tier": 9}, "1 questions of tier 9 are for train"),
    ],
)
def test_wrong_lines_are_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    first, *others = rows("train")
    train = written(tmp_path / "train.jsonl", [{**first, **change}, *others])
    with pytest.raises(InputError, match=words):
        read_tiers([train, written(tmp_path / "val.jsonl", rows("val"))])


def test_wrong_ids_to_leave_out(tmp_path: Path) -> None:
    data = written(tmp_path / "a.jsonl", [*rows("train"), *rows("val")])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="names no ids"):
        read_tiers([data], tmp_path / "empty.txt")
    with pytest.raises(InputError, match="cannot read ids"):
        read_tiers([data], tmp_path / "none.txt")

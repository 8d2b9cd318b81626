"""Questions with choices through the commands: search, train on given programs, evaluate."""

import json
from pathlib import Path
from typing import Any

import pytest

from polar_fx.cli import main
from polar_fx.search.records.record_file import RecordReader
from tiny_search import save_tiny

SPLITS = ("train", "train", "validation", "test")
MENU = ("skip 2", "repeat 1", "skip 1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny(tmp_path_factory.mktemp("model"), depth=4)
    rows = map(_row, range(40))
    (made / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (made / "menu.txt").write_text("\n".join(MENU[:2]))
    return made


def _row(i: int) -> dict[str, Any]:
    return {
        "id": f"c{i}",
        "task": ("winogrande", "mine")[i % 2],
        "question": f"{chr(65 + i)} met B, as _ fell." if i % 2 == 0 else f"{i * 7}?",
        "choices": [f"{chr(97 + i % 26)}{k}" for k in range(2 + i % 2)],
        "answer": i % 2,
        "split": SPLITS[i // 2 % 4],
    }


def arguments(folder: Path) -> list[str]:
    data = str(folder / "rows.jsonl")
    return ["--model", str(folder), "--backend", "eager", "--data", data, "--json"]


def test_from_questions_to_a_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, out, report = tmp_path / "run.jsonl", tmp_path / "predictor", tmp_path / "report"
    search = ["search", *arguments(folder), "--questions", "6", "--simulations", "5"]
    assert main([*search, "--set", "reward=margin", "--out", str(records)]) == 0
    found = list(RecordReader(records))
    assert {r.question.choices for r in found if r.question.task == "mine"} == {
        ("b0", "b1", "b2"),
        ("d0", "d1", "d2"),
        ("f0", "f1", "f2"),
    }
    for record in found:  # above 1/2 exactly where the right choice leads
        assert all((e.reward >= 0.5) == e.verdict.correct for e in record.explored)
    capsys.readouterr()

    train = ["train", *arguments(folder), "--after-steps", "1", "--out", str(out)]
    train += ["--program", str(folder / "menu.txt"), "--program", MENU[2]]
    assert main([*train, "--epochs", "2", "--networks", "1"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [row["program"] for row in results["menu"]] == [
        "0-3 /4",
        "0-1 3 /4",
        "0 (1)*2 2-3 /4",
        "0 2-3 /4",
    ]
    assert results["questions"] == {"train": 20, "validation": 10, "screened": 0}
    assert results["prompts"] == {"mine": "choices:any@1", "winogrande": "choices:winogrande@1"}
    few = results["too_few_to_certify"]
    assert few.startswith("validation questions of winogrande (5), mine (5) are too few")
    assert "takes 1286 of each task even if" in few

    evaluate = ["evaluate", str(out), *arguments(folder), "--no-baselines", "--answers", "8"]
    assert main([*evaluate, "--no-figures", "--out", str(report)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"] == {"mine": 5, "winogrande": 5}, "their file keeps them for the test"
    assert told["generated"]["agreement"] == 1.0, "no key, and the same choice"
    assert "most confident of 3 programs" in (report / "answers" / "arms.md").read_text()


def test_a_menu_comes_from_somewhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", *arguments(folder), "--out", str(tmp_path / "predictor")]
    assert main(train) == 2
    assert "there is no menu" in capsys.readouterr().err

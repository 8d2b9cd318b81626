"""Long work as library calls: questions by hand, and a search without a command line."""

import json
from pathlib import Path

import pytest

from polar_fx.errors import InputError
from polar_fx.jobs.questions import Asked, row_tokens
from polar_fx.jobs.search import SearchJob, run
from polar_fx.questions import EncodedQuestion, PromptTemplate, Question, get_template
from polar_fx.search import SearchConfig
from polar_fx.search.workers import Workplace
from tiny_search import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny(tmp_path_factory.mktemp("model"), depth=3)
    rows = [{"id": f"r{i}", "question": f"{i}?", "answer": "1", "task": "odd"} for i in range(3)]
    (made / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return made


def test_a_search_is_a_call_that_shows_nothing_and_is_gone_on_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = SearchJob(
        asked=Asked(data=(folder / "rows.jsonl",), prompt="plain"),
        out=tmp_path / "run.jsonl",
        config=SearchConfig(simulations=4),
        workplace=Workplace(model=str(folder), backend="eager"),
    )
    result = run(job)
    explored = {r.question.id: len(r.explored) for r in result.records()}
    assert (result.questions, result.searched, set(explored)) == (3, 3, {"r0", "r1", "r2"})
    assert result.counts.evaluations == sum(explored.values()) + 3
    assert run(job).searched == 0, "every question has its record"
    assert capsys.readouterr() == ("", "")


def test_questions_are_shared_among_tasks() -> None:
    asked = Asked(tasks=("addition", "sequences", "addition"), count=5, split="validation", seed=3)
    found = asked.questions()
    assert [q.task for q in found] == ["addition"] * 3 + ["sequences"] * 2
    assert asked.split_name == "validation" and Asked(tasks=("addition",)).split_name == "train"
    assert [q.task for q in Asked(tasks=("addition", "sequences"), count=1).questions()] == [
        "addition"
    ]


def test_questions_of_files(folder: Path) -> None:
    path = folder / "rows.jsonl"
    assert [q.id for q in Asked(data=(path,), count=2).questions()] == ["r0", "r1"]
    assert (
        Asked(data=(path,)).prompt_name([]) == "direct" and Asked(data=(path,)).split_name is None
    )
    with pytest.raises(InputError, match="hold the same question id"):
        Asked(data=(path, path)).questions()
    with pytest.raises(InputError, match="either tasks or files of data"):
        Asked().questions()


@pytest.mark.parametrize(
    "limit, generated, tokens",
    [
        (None, False, 63),  # 2 + 30 + 20 = 52 tokens
        (None, True, 127),  # room for 40 generated ones: 72
        (60, False, 60),  # the model's own limit
        (40, False, 52),  # too long for the model, which the model says itself
    ],
)
def test_rows_are_as_long_as_the_longest(limit: int | None, generated: bool, tokens: int) -> None:
    template = get_template("plain", "odd")
    template = PromptTemplate(**{**vars(template), "max_new_tokens": 40})
    encoded = [
        EncodedQuestion("a", (1, 1), (2,) * 30, ((3,) * 20, (3,))),
        EncodedQuestion("b", (1, 1), (2,), ((3,),)),
    ]
    questions = [Question(id=name, task="odd", question="?", answers=("1",)) for name in "ab"]
    found = row_tokens(
        encoded, questions, templates={"odd": template}, limit=limit, generated=generated
    )
    assert found == tokens

"""Baselines: which records they may see, and what is chosen for the test questions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import polar_fx
from evaluation_samples import (
    DEPTH,
    LONG,
    MENU,
    QUESTIONS,
    RECORDS,
    SHORT,
    record,
    selector,
)
from polar_fx.errors import InputError, RecordFileError
from polar_fx.evaluation import baselines
from polar_fx.evaluation.baselines import Setting, TrainedOn, TrainingRecords
from polar_fx.evaluation.choices import Choice
from polar_fx.predictor.features import Features
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, Question
from polar_fx.search.config import SearchConfig
from polar_fx.search.records.records import SearchHeader, SearchRecord
from polar_fx.training.pipeline import MINED
from search_samples import write
from tiny_search import peaked

HEADER = SearchHeader("f" * 32, DEPTH, SearchConfig(simulations=2))


def predictor(folder: Path, train: list[SearchRecord], *, validation: list[SearchRecord]) -> Path:
    """What training leaves beside a predictor."""
    parts = folder / "parts"
    parts.mkdir(parents=True)
    write(parts / "train.jsonl", train, header=HEADER)
    write(parts / "validation.jsonl", validation, header=HEADER)
    (parts / MINED).write_text(json.dumps(["mined", "a1"]))
    return folder


def program_names(choices: list[Choice]) -> dict[str, list[Program]]:
    names: dict[str, list[Program]] = {}
    for choice in choices:
        names[choice.name] = [program for (program,) in choice.programs]
    return names


def test_what_a_predictor_was_made_of(tmp_path: Path) -> None:
    found = TrainedOn.read(predictor(tmp_path, RECORDS[:2], validation=RECORDS[2:3]))
    assert found.train == RECORDS[:2] and found.validation == RECORDS[2:3]
    assert found.questions == QUESTIONS[:3]
    assert found.ids == {"mined", "a1", "a2", "m1"}


def test_a_folder_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    folder = predictor(tmp_path, RECORDS[:2], validation=RECORDS[2:3])
    (folder / "parts" / "validation.jsonl").unlink()
    with pytest.raises(RecordFileError):
        TrainedOn.read(folder)
    (folder / "parts" / MINED).write_text("[")
    with pytest.raises(InputError, match=rf"{MINED} cannot be read: .*; train again, or bring"):
        TrainedOn.read(folder)
    (folder / "parts" / MINED).unlink()
    with pytest.raises(InputError, match=rf"{MINED} cannot be read: .*No such file"):
        TrainedOn.read(folder)


def test_searches_add_to_what_training_saw(tmp_path: Path) -> None:
    trained_on = TrainedOn(RECORDS[:2], RECORDS[2:3], frozenset())
    again = record(QUESTIONS[0], np.array([True, False, False]))
    more = Question("new", "add", "?", ("1",))
    search = write(
        tmp_path / "s.jsonl", [again, record(more, np.array([False, True, True]))], header=HEADER
    )
    held_out = write(tmp_path / "v.jsonl", [RECORDS[2]], header=HEADER)
    found = baselines.training_records(
        trained_on, [search, held_out], test_ids={"m2"}, model=HEADER.model
    )
    assert found.dense == RECORDS[:2] and found.validation == RECORDS[2:3]
    # a question once, by the search's verdicts, and none of validation
    assert [r.question.id for r in found.train] == ["a1", "new", "a2"]
    assert [found.train[0].verdicts[p].correct for p in MENU.programs] == [True, False, False]


def test_test_questions_and_other_models_are_refused(tmp_path: Path) -> None:
    trained_on = TrainedOn(RECORDS[:2], RECORDS[2:3], frozenset())
    search = write(tmp_path / "s.jsonl", [RECORDS[3]], header=HEADER)
    for ids, first in (({"a2", "x"}, "a2"), ({"m1"}, "m1"), ({"m2"}, "m2")):
        with pytest.raises(InputError, match=f"test question '{first}' .and 0 more. is among"):
            baselines.training_records(trained_on, [search], test_ids=ids, model=HEADER.model)
    with pytest.raises(InputError, match=r"s\.jsonl has records of another model; name searches"):
        baselines.training_records(trained_on, [search], test_ids=set(), model="e" * 32)


def test_static_programs_by_hand() -> None:
    # of questions: identity 1, 0, 0, 1; short 1, 1, 0, 0; long 0, 1, 1, 1
    known = TrainingRecords(RECORDS, [], [])
    found = program_names(baselines.static_choices(known, selector(), questions=QUESTIONS))
    assert found == {
        "best static program": [LONG] * 4,
        "best static program <= 0.9 steps": [SHORT] * 4,
        # on add, the short one is right twice; on mul, the long one
        "best static program a task (told the task)": [SHORT, SHORT, LONG, LONG],
    }


def encoded(name: str, *prompt: int) -> EncodedQuestion:
    return EncodedQuestion(name, (1,), prompt, ((2,),))


@pytest.fixture(scope="module")
def model() -> polar_fx.CompiledModel:
    return polar_fx.compile(peaked(), "eager", max_length=31, cache=False)


def test_pruning_and_random_programs_have_the_steps_of_the_budget(
    model: polar_fx.CompiledModel,
) -> None:
    asked = [encoded("a", 3, 4, 5), encoded("b", 6)]
    choices, influences = baselines.pruning_choices(model, asked, selector=selector(), n=3, seed=0)
    found = program_names(choices)
    assert list(found) == ["block-influence pruning, 5 steps", "random program of 5 steps"]
    pruned, other = found.values()
    # the layer of least influence after the trunk of two steps is left out
    least = 2 + int(np.argmin(influences[2:]))
    assert pruned == [Program.parse(f"skip {least}", DEPTH)] * 3
    assert len(influences) == DEPTH and len(other) == 3
    assert all(p.num_steps == 5 and p.path[:2] == (0, 1) for p in other)


SETTING = Setting(TrainingRecords(RECORDS, RECORDS[:3], RECORDS[3:]), depth=DEPTH, trunk=2, seed=0)


def states(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 + i, 3, generator=generator) for i in range(count)]


def test_routers_choose_for_every_question_and_keep_the_trunk() -> None:
    by_id = dict(zip([q.id for q in QUESTIONS], states(4, 0), strict=True))
    tokens = {"train": {n: by_id[n] for n in ("a1", "a2", "m1")}, "validation": {"m2": by_id["m2"]}}
    choices, notes = baselines.router_choices(SETTING, tokens, seen=states(5, 1))
    names = ["per-layer router (DR.LLM-style)", "skip gate <= 0.9 steps (MindSkip-style)"]
    assert [c.name for c in choices] == names == list(notes)
    for choice in choices:
        assert len(choice.programs) == 5 and not choice.oracle
        assert all(p.path[:2] == (0, 1) for (p,) in choice.programs)
    assert all(p.num_steps <= DEPTH for (p,) in choices[1].programs)  # a gate only skips
    assert all("history" not in note for note in notes.values())


def test_polar_by_its_decoders() -> None:
    by_id = dict(zip([q.id for q in QUESTIONS], states(4, 0), strict=True))
    choices, notes = baselines.polar_choices("P", SETTING, tokens=by_id, seen=states(2, 1))
    assert [(c.name, c.oracle, len(c.programs)) for c in choices] == [
        ("P, first of beam", False, 2),
        ("P, joint decode", False, 2),
        ("P, budget 0.9", False, 2),
        ("P, pass@5", True, 2),
    ]
    assert all(p.num_steps <= 0.9 * DEPTH for (p,) in choices[2].programs)
    first = [p for (p,) in choices[0].programs]
    assert first == [several[0] for several in choices[3].programs]
    assert notes["identity_first"] == sum(p.is_identity for p in first) / 2
    assert set(notes["labels"]) == {"train", "validation"}


def test_an_encoder_sees_questions_of_training_and_of_the_test() -> None:
    class Encoder:
        fingerprint = "e" * 32
        texts: tuple[str, ...] = ()

        def states(self, texts: list[str]) -> list[torch.Tensor]:
            self.texts = tuple(texts)
            return states(len(texts), 2)

    encoder = Encoder()
    test = [Question("t", "add", "9+9", ("18",))]
    choices, notes = baselines.encoder_choices(encoder, SETTING, test=test)  # type: ignore[arg-type]
    assert encoder.texts == ("1+1", "1+2", "2*2", "2*3", "9+9")
    assert [len(c.programs) for c in choices] == [1] * 4
    (name,) = notes
    assert name == "PoLar network on a text encoder" and notes[name]["encoder"] == "e" * 32


def test_learned_baselines_use_the_selectors_states(model: polar_fx.CompiledModel) -> None:
    asked = {q.id: encoded(q.id, 3 + i, 4, 5) for i, q in enumerate(QUESTIONS)}
    hidden = [torch.randn(3, 32).bfloat16() for _ in range(2)]
    choices, notes = baselines.learned_choices(
        model, SETTING, features=Features(2, 4), encoded=asked, seen=hidden
    )
    assert len(choices) == 2 + 4 and "PoLar network" in notes
    assert {len(c.programs) for c in choices} == {2}


def test_a_setting_names_its_splits() -> None:
    assert SETTING.splits == {"train": RECORDS[:3], "validation": RECORDS[3:]}
    assert Setting(SETTING.known, DEPTH, 2).seed == 0


def test_routers_without_an_answered_question_are_left_out_with_the_reason() -> None:
    wrong = [record(question, np.zeros(3, dtype=bool)) for question in QUESTIONS[2:]]
    setting = Setting(TrainingRecords(RECORDS[:2], RECORDS[:2], wrong), DEPTH, 2)
    states = {"train": {}, "validation": {}}
    for split, records in setting.splits.items():
        for each in records:
            states[split][each.question.id] = torch.ones(3, 8)
    choices, notes = baselines.router_choices(setting, states, seen=[torch.ones(3, 8)])
    assert choices == [] and len(notes) == 2
    for told in notes.values():
        assert "validation questions; ask others" in told[baselines.LEFT_OUT]

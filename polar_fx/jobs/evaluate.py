"""Comparing a predictor with the identity and with baselines on test questions."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..evaluation.answers import Answerer, Answers
from ..evaluation.baselines import (
    LEFT_OUT,
    Setting,
    TrainedOn,
    TrainingRecords,
    encoder_choices,
    learned_choices,
    pruning_choices,
    static_choices,
    training_records,
)
from ..evaluation.choice_answers import ChoiceAnswerer
from ..evaluation.choices import (
    BEST_STATIC,
    SELECTOR_ACCURACY,
    SELECTOR_LIKELIEST,
    Choice,
    arm_results,
    selector_choices,
    static,
    wanted_programs,
)
from ..evaluation.conclusion import conclusion
from ..evaluation.page import Page
from ..evaluation.polar.text_encoder import TextEncoder
from ..evaluation.report import against, distributions, selector_report, write_report
from ..evaluation.votes import GeneratedArms, generated_arms
from ..output.files import write_whole
from ..predictor.menu import Proposal
from ..predictor.saved import read_notes
from ..predictor.saved_predictor import SavedPredictor
from ..predictor.selector import Selector
from ..program import Program
from ..questions import Question
from ..search.records.records import SearchRecord
from ..search.workers import Workplace
from ..stats.arms import IDENTITY
from ..stats.calibration import Reliability, reliability
from ..training.verdict_table import Rows, VerdictTable
from .labeller import Labeller
from .opening import OtherQuestions
from .progress import silent_console
from .questions import Asked, prompt_keys

if TYPE_CHECKING:
    from rich.console import Console

_TEST_QUESTIONS = 2000


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Settings of an evaluation.

    `predictor` is a folder made by training, `out` that of the report and its verdicts. `asked`
    says what is tested: of files, the questions that these give to no other split; with neither
    tasks nor files, the tasks it was trained on. Its `count` None is 2000 questions of tasks, all
    of files, its `prompt` None the predictor's own, and its `split` is not looked at. `records` are
    files of searches, more labels for baselines. `answers` questions are also generated, with
    `votes` programs that vote. `encoder` is a text encoder's folder or id, for PoLar's network as
    the paper has it; it is one of the `baselines`. `workers` processes judge.
    """

    predictor: Path
    out: Path
    asked: Asked = field(default_factory=Asked)
    records: tuple[Path, ...] = ()
    answers: int = 400
    votes: int = 3
    encoder: str | None = None
    baselines: bool = True
    figures: bool = True
    seed: int = 0
    workplace: Workplace = field(default_factory=Workplace)
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results, which are JSON values, what they come to in a few lines, and the files that were
    written.
    """

    results: dict[str, Any]
    conclusion: str
    files: list[Path]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """What is evaluated, and on which questions.

    Shape legend: N questions, K programs of the menu, T tokens, d hidden size.
    """

    labeller: Labeller
    selector: Selector
    notes: dict[str, Any]
    rows: Rows
    known: TrainingRecords
    states: list[Tensor]  # N of [T, d]
    proposals: list[Proposal]

    @cached_property
    def chances(self) -> np.ndarray:
        """The probabilities, f64[N, K]."""
        return np.stack([proposal.probabilities for proposal in self.proposals])

    @property
    def questions(self) -> list[Question]:
        return [question for question, _ in self.rows]

    @property
    def unseen(self) -> list[str]:
        """Tasks that the predictor was not trained on."""
        return sorted(set(self.labeller.templates) - set(self.notes["tasks"]))


def run(job: EvaluateJob, console: "Console | None" = None) -> Evaluation:
    """Evaluate; writes the report to `job.out`.

    Verdicts are kept there, and an interrupted run of the same settings is gone on with. Raises
    InputError for settings that do not fit or a test question that was trained on, RecordFileError,
    and what `polar_fx.load` and `polar_fx.compile` raise.
    """
    began = time.perf_counter()
    console = console or silent_console()
    if job.encoder is not None and not job.baselines:
        raise InputError(
            f"encoder {job.encoder!r} is for one of the baselines, which are left out; ask for the "
            "baselines, or leave encoder out"
        )
    encoder = None if job.encoder is None else TextEncoder.load(job.encoder)
    subject = _open(job, console)
    choices = _own_choices(subject)
    baselines: dict[str, Any] = {}
    if job.baselines:
        with console.status("training the baselines ..."):
            more, baselines = _baselines(subject, encoder, seed=job.seed)
            for name, notes in baselines.items():
                if LEFT_OUT in notes:
                    console.print(f"left out: {name} ({notes[LEFT_OUT]})", markup=False)
        choices += more
    records = subject.labeller.records(
        job.out / "verdicts.jsonl",
        subject.rows,
        programs=wanted_programs(choices, subject.questions),
    )
    arms = arm_results(choices, records, unseen=subject.unseen)
    right = VerdictTable.of(records, subject.selector.menu.programs).right
    by_name = {choice.name: choice for choice in choices}
    asked = _asked_for_answers(job, len(subject.rows))
    answers = _generate(
        job,
        subject,
        chosen=by_name[SELECTOR_ACCURACY],
        records=records,
        part=asked,
        console=console,
    )
    results = {
        **_facts(job, subject),
        "against_static": against(arms, SELECTOR_ACCURACY, other=BEST_STATIC),
        "distributions": _by_distribution(subject, by_name, records=records, right=right),
        "generated": None if answers is None else answers.to_dict(),
        "baselines": baselines,
        "seconds": time.perf_counter() - began,
    }
    files = write_report(
        job.out, arms, results=results, diagrams=_diagrams(subject, right), figures=job.figures
    )
    files.append(_write_page(job, subject, right=right, asked=asked, generated=answers))
    if answers is not None:
        facts = {"n": len(asked)}
        files += write_report(
            job.out / "answers", answers.arms, results=facts, diagrams={}, figures=job.figures
        )
    return Evaluation(results=results, conclusion=conclusion(arms), files=files)


def _open(job: EvaluateJob, console: "Console") -> _Subject:
    """Questions that training did not see, the model, and what the predictor makes of them."""
    notes = read_notes(job.predictor)
    trained_on = TrainedOn.read(job.predictor)
    asked = _with_defaults(job.asked, notes)
    every = (replace(asked, count=None) if asked.data else asked).questions()
    questions = _not_trained_on([q for q in every if _may_test(q)], trained_on, console=console)
    questions = questions[: asked.count]
    templates = replace(asked, prompt=_prompt(asked, notes, questions=questions)).templates(
        questions
    )
    learned = trained_on.questions if job.baselines else []
    labeller = Labeller(
        job.workplace,
        templates,
        questions=questions,
        workers=job.workers,
        console=console,
        generated=job.answers > 0,
        other=OtherQuestions(questions=learned, prompt=notes["prompt"]),
    )
    predictor = SavedPredictor.of_folder(job.predictor)
    predictor.require_model(labeller.compiled.library)
    selector = predictor.selector
    rows = [(q, labeller.encoded[q.id]) for q in labeller.with_difficulty(questions)]
    known = training_records(
        trained_on,
        job.records,
        test_ids={q.id for q in questions},
        model=labeller.model_fingerprint,
    )
    states = labeller.states(rows, selector.features)
    pooled = torch.stack([selector.features.pooled(each) for each in states])
    return _Subject(
        labeller=labeller,
        selector=selector,
        notes=notes,
        rows=rows,
        known=known,
        states=states,
        proposals=selector.proposals(pooled),
    )


def _with_defaults(asked: Asked, notes: dict[str, Any]) -> Asked:
    if asked.data:
        return replace(asked, split=None)
    tasks = asked.tasks or tuple(notes["tasks"])
    return replace(asked, tasks=tasks, count=asked.count or _TEST_QUESTIONS, split="test")


def _may_test(question: Question) -> bool:
    """Whether its file does not keep it for another split."""
    return question.split in (None, "test")


def _prompt(asked: Asked, notes: dict[str, Any], *, questions: list[Question]) -> str:
    # the tasks of files have no few-shot prompt
    if asked.data and notes["prompt"] == "few-shot":
        return asked.prompt_name(questions)
    return asked.prompt or notes["prompt"]


def _not_trained_on(
    questions: list[Question], trained_on: TrainedOn, *, console: "Console"
) -> list[Question]:
    left = [q for q in questions if q.id not in trained_on.ids]
    if seen := len(questions) - len(left):
        console.print(f"{seen} questions were seen in training and are left out", style="dim")
    if not left:
        raise InputError(
            f"all {len(questions)} questions were seen in training, or their file keeps them for "
            "another split than test; ask others"
        )
    return left


def _own_choices(subject: _Subject) -> list[Choice]:
    """The identity, the predictor's policies, and static programs."""
    identity = Program.identity(subject.labeller.depth)
    return [
        static(IDENTITY, identity, n=len(subject.rows)),
        *selector_choices(subject.selector, subject.proposals),
        *static_choices(subject.known, subject.selector, questions=subject.questions),
    ]


def _baselines(
    subject: _Subject, encoder: TextEncoder | None, *, seed: int
) -> tuple[list[Choice], dict[str, Any]]:
    """What trained baselines choose, and how their training went."""
    labeller, known, selector = subject.labeller, subject.known, subject.selector
    learned = [record.question for record in (*known.train, *known.validation)]
    encoded = labeller.encode(learned, subject.notes["prompt"])
    choices, influences = pruning_choices(
        labeller.compiled, encoded, selector=selector, n=len(subject.rows), seed=seed
    )
    setting = Setting(known, labeller.depth, selector.features.num_steps, seed)
    more, trained = learned_choices(
        labeller.compiled,
        setting,
        features=selector.features,
        encoded={e.id: e for e in encoded},
        seen=subject.states,
    )
    choices += more
    notes = {"block_influences": influences, **trained}
    if encoder is not None:
        more, trained = encoder_choices(encoder, setting, test=subject.questions)
        choices += more
        notes |= trained
    # what was learned knows nothing of layers that others need
    library = labeller.compiled.library
    return [choice.that_run(library.runs) for choice in choices], notes


def _asked_for_answers(job: EvaluateJob, n: int) -> list[int]:
    """The places of the questions that answers are generated to, of n."""
    # shuffled, because rows are ordered by task and cycle through its cells
    order = np.random.default_rng(job.seed).permutation(n)
    return sorted(order[: job.answers].tolist())


def _generate(
    job: EvaluateJob,
    subject: _Subject,
    *,
    chosen: Choice,
    records: Sequence[SearchRecord],
    part: list[int],
    console: "Console",
) -> GeneratedArms | None:
    """Generated answers to the questions at these places; None if there are none."""
    if not part:
        return None
    labeller = subject.labeller
    answerer: Answers = Answerer(
        labeller.compiled, labeller.tokenizer, templates=labeller.templates
    )
    if any(question.choices for question in subject.questions):
        answerer = ChoiceAnswerer(labeller.place.forcing)
    rows = [subject.rows[i] for i in part]
    with console.status("generating answers ..."):
        return generated_arms(
            answerer,
            subject.selector,
            chances=subject.chances[part],
            chosen=chosen.at(part),
            records=[records[i] for i in part],
            rows=rows,
            votes=job.votes,
            seed=job.seed,
            unseen=subject.unseen,
        )


def _write_page(
    job: EvaluateJob,
    subject: _Subject,
    *,
    right: np.ndarray,
    asked: list[int],
    generated: GeneratedArms | None,
) -> Path:
    """`report.html`, with the answers that were generated to the questions asked for them."""
    answers: dict[int, dict[Program, str]] = {}
    if generated is not None:
        for place, said in zip(asked, generated.answers, strict=True):
            answers[place] = {program: answer.text.strip() for program, answer in said.items()}
    page = Page.of(
        subject.selector,
        title=f"{job.predictor.name} on {len(subject.rows)} questions",
        questions=subject.questions,
        proposals=subject.proposals,
        right=right,
        answers=answers,
    )
    return write_whole(page.html().encode(), job.out / "report.html")


def _facts(job: EvaluateJob, subject: _Subject) -> dict[str, Any]:
    """What was evaluated, and on what."""
    labeller = subject.labeller
    counts = Counter(question.task for question in subject.questions)
    calibration = subject.selector.calibration.to_dict()
    return {
        "ok": True,
        "predictor": job.predictor.name,
        "model": labeller.model_fingerprint,
        "dtype": labeller.workplace.weights,
        "questions": len(subject.questions),
        "tasks": {task: counts[task] for task in labeller.templates},
        "trained_on": subject.notes["tasks"],
        "out_of_distribution": subject.unseen,
        "prompts": prompt_keys(labeller.templates),
        "threshold": calibration["threshold"],
        "threshold_by_task": calibration["by_task"],
    }


def _by_distribution(
    subject: _Subject,
    by_name: dict[str, Choice],
    *,
    records: Sequence[SearchRecord],
    right: np.ndarray,
) -> dict[str, Any]:
    """A report on the questions of tasks that were trained on, and one on the others.

    `right` bool[N, K] says which programs of the menu are right.
    """
    singles = [by_name[name] for name in (SELECTOR_ACCURACY, IDENTITY, SELECTOR_LIKELIEST)]
    found: dict[str, Any] = {}
    for name, places in distributions(subject.questions, subject.notes["tasks"]).items():
        choices = [choice.at(places) for choice in singles]
        found[name] = selector_report(
            choices,
            [records[i] for i in places],
            chances=subject.chances[places],
            right=right[places],
        )
    return found


def _diagrams(subject: _Subject, right: np.ndarray) -> dict[str, Reliability]:
    parts = distributions(subject.questions, subject.notes["tasks"])
    return {
        f"selector, {name}": reliability(subject.chances[places], right[places])
        for name, places in parts.items()
    }

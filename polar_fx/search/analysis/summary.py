"""What searches found: how many questions some program answers, how short it is, and how far to
believe that.

Whatever is said of explored programs here is an oracle: that one of them is right is known from the
answer key, and nothing says that it could be chosen without. Intervals are Wilson's at 95 %, and
hold for questions drawn independently.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...program import Op, Program
from ...stats.intervals import Share, mean, spearman
from ..records.record_file import RecordReader
from ..records.records import SearchHeader, SearchRecord
from .edit_effects import edit_effects, edits_of
from .menu_coverage import key, menu_report, merge, split_records

MENU_SIZES = (1, 2, 5, 10, 20, 50, 100)
_Model = tuple[str, int, str]  # fingerprint, depth, prompts


def is_skip_only(program: Program) -> bool:
    """Whether layers are skipped and nothing else is done: none repeats, moves or is damped."""
    ascends = all(
        earlier < later for earlier, later in zip(program.path, program.path[1:], strict=False)
    )
    return ascends and not program.blends and program.num_steps < program.depth


def is_repeat_only(program: Program) -> bool:
    """Whether layers repeat, damped or not, and none is skipped."""
    return program.num_unique_layers == program.depth < program.num_steps


def summary(records: Iterable[SearchRecord]) -> dict[str, Any]:
    """The figures of some questions, of one depth, as JSON values; None where there is nothing to
    tell.

    A share is {count, n, share, low, high} (`Share.to_dict`). "Valid" programs are explored ones
    that answer right.

    questions, depth: how many questions, of a model of how many layers
    accuracy: {baseline, skip_only, repeat_only, both}, shares; the last three of questions that the
        identity or any explored program of that kind (both: any program) answers. One search made
        them all, so no kind had its full budget
    shorter: {right, wrong, corrected}, shares: of questions the identity gets right, those with a
        valid program of fewer steps; of those it gets wrong, those with one, and those with any
        valid program
    shortest_steps: {mean, n} over the questions with a right program, which may be the identity
    explored, valid: programs a question, on average; the identity is not counted
    evaluations, seconds, evaluations_per_second: of the records that have seconds; verifying is in
    neither
    steps: {valid, shortest}: [[steps, count], ...] of valid programs, and of each question's
    shortest right program
    edits: {programs, not_segmentable, skip, repeat, times}: valid programs, those that no segments
        make, and of the others [[length, count], ...] of skips and of repeats, and [[times, count],
        ...] of repeats
    verification: {programs, questions, flipped, identity_flipped, corrected_confirmed}, or None if
        nothing was verified: shares of explored programs and of identities whose second verdict
        differs; of corrected questions with verified programs, those where a program is right both
        times
    likelihood: {pairs, questions, pooled, mean, n_mean}, or None without teacher-forced verdicts:
        Spearman's correlation of gain in log-likelihood over the identity and change of correctness
        (-1, 0, 1), over all pairs of question and program, and its mean over the n_mean questions
        where both vary

    Raises InputError if the depths differ.
    """
    records = list(records)
    depths = sorted({record.depth for record in records})
    if len(depths) > 1:
        raise InputError(
            f"records of models of {depths[0]} and {depths[1]} layers; summarize each model alone"
        )
    right = [record for record in records if record.identity_correct]
    wrong = [record for record in records if not record.identity_correct]
    valid = [program for record in records for program in record.valid]
    shortest = [steps for record in records if (steps := _shortest(record)) is not None]
    timed = [
        (len(record.explored) + 1, record.seconds)
        for record in records
        if record.seconds is not None
    ]
    evaluations = sum(n for n, _ in timed)
    seconds = math.fsum(s for _, s in timed)
    num_explored = [len(record.explored) for record in records]
    num_valid = [len(record.valid) for record in records]
    rescued = Share.of(record.is_rescued for record in wrong)
    return {
        "questions": len(records),
        "depth": depths[0] if depths else None,
        "accuracy": {
            "baseline": Share(len(right), len(records)).to_dict(),
            "skip_only": _accuracy(records, is_skip_only),
            "repeat_only": _accuracy(records, is_repeat_only),
            "both": _accuracy(records, lambda _: True),
        },
        "shorter": {
            "right": Share.of(map(_has_shorter, right)).to_dict(),
            "wrong": Share.of(map(_has_shorter, wrong)).to_dict(),
            "corrected": rescued.to_dict(),
        },
        "shortest_steps": {"mean": mean(shortest), "n": len(shortest)},
        "explored": mean(num_explored),
        "valid": mean(num_valid),
        "evaluations": evaluations if timed else None,
        "seconds": seconds if timed else None,
        "evaluations_per_second": evaluations / seconds if seconds > 0 else None,
        "steps": {
            "valid": _counts(program.num_steps for program in valid),
            "shortest": _counts(shortest),
        },
        "edits": _edits(valid),
        "verification": _verification(records),
        "likelihood": _likelihood(records),
    }


def _accuracy(
    records: Sequence[SearchRecord], is_allowed: Callable[[Program], bool]
) -> dict[str, Any]:
    """The share of questions that the identity or any allowed program answers."""
    return Share.of(
        record.identity_correct or any(map(is_allowed, record.valid)) for record in records
    ).to_dict()


def _has_shorter(record: SearchRecord) -> bool:
    return any(program.num_steps < record.depth for program in record.valid)


def _shortest(record: SearchRecord) -> int | None:
    """Steps of the shortest right program."""
    identity = [record.depth] if record.identity_correct else []
    return min([*identity, *(program.num_steps for program in record.valid)], default=None)


def _counts(values: Iterable[int]) -> list[list[int]]:
    return [[value, count] for value, count in sorted(Counter(values).items())]


def _edits(programs: Iterable[Program]) -> dict[str, Any]:
    found = [edits_of(program) for program in programs]
    edits = [edit for each in found if each is not None for edit in each]
    skips = [edit.num_layers for edit in edits if edit.op is Op.SKIP]
    repeats = [edit for edit in edits if edit.op is Op.REPEAT]
    repeated = [edit.num_layers for edit in repeats]
    return {
        "programs": len(found),
        "not_segmentable": found.count(None),
        "skip": _counts(skips),
        "repeat": _counts(repeated),
        "times": _counts(edit.times for edit in repeats),
    }


def _verification(records: Sequence[SearchRecord]) -> dict[str, Any] | None:
    explored: list[bool] = []
    identity: list[bool] = []
    confirmed: list[bool] = []
    for record in records:
        first = {each.program: each.verdict.correct for each in record.explored}
        flips = {p: again.correct != first[p] for p, again in record.verified.items() if p in first}
        explored += flips.values()
        identity += [
            again.correct != record.baseline.correct
            for p, again in record.verified.items()
            if p.is_identity
        ]
        valid = [not flipped for program, flipped in flips.items() if first[program]]
        if not record.baseline.correct and valid:
            confirmed.append(any(valid))
    if not explored and not identity:
        return None
    return {
        "programs": len(explored),
        "questions": sum(bool(record.verified) for record in records),
        "flipped": Share.of(explored).to_dict(),
        "identity_flipped": Share.of(identity).to_dict(),
        "corrected_confirmed": Share.of(confirmed).to_dict(),
    }


def _likelihood(records: Sequence[SearchRecord]) -> dict[str, Any] | None:
    gains: list[float] = []
    changes: list[float] = []
    each_question: list[float] = []
    questions = 0
    for record in records:
        before = record.baseline.log_likelihood
        if before is None or not math.isfinite(before):
            continue
        pairs = [
            (after - before, int(each.verdict.correct) - int(record.baseline.correct))
            for each in record.explored
            # -inf has a rank, the last one; not a number has none.
            if (after := each.verdict.log_likelihood) is not None and not math.isnan(after)
        ]
        if pairs:
            questions += 1
            own_gains, own_changes = zip(*pairs, strict=True)
            gains += own_gains
            changes += own_changes
            if (rho := spearman(own_gains, own_changes)) is not None:
                each_question.append(rho)
    if not gains:
        return None
    return {
        "pairs": len(gains),
        "questions": questions,
        "pooled": spearman(gains, changes),
        "mean": mean(each_question),
        "n_mean": len(each_question),
    }


def group_summaries(records: Sequence[SearchRecord]) -> list[dict[str, Any]]:
    """{task, difficulty, cell, summary} of each task, then of each difficulty and each cell in it;
    None: of all.
    """
    made = []
    for task in sorted({record.question.task for record in records}):
        inside = [record for record in records if record.question.task == task]
        made.append({"task": task, "difficulty": None, "cell": None, "summary": summary(inside)})
        for difficulty in sorted({d for r in inside if (d := r.question.difficulty) is not None}):
            chosen = [record for record in inside if record.question.difficulty == difficulty]
            made.append(
                {"task": task, "difficulty": difficulty, "cell": None, "summary": summary(chosen)}
            )
        for cell in sorted({record.question.cell for record in inside} - {""}):
            chosen = [record for record in inside if record.question.cell == cell]
            made.append(
                {"task": task, "difficulty": None, "cell": cell, "summary": summary(chosen)}
            )
    return made


@dataclass(frozen=True, slots=True)
class SearchFile:
    """The header and all records of one file."""

    path: str
    header: SearchHeader
    records: tuple[SearchRecord, ...]

    @classmethod
    def read(cls, path: str | Path) -> "SearchFile":
        """Raises RecordFileError if it is damaged or none of ours."""
        reader = RecordReader(path)
        return cls(str(path), reader.header, tuple(reader))


def analyze(
    files: Sequence[SearchFile],
    held_out: Sequence[SearchFile] = (),
    *,
    menu_sizes: Sequence[int] = MENU_SIZES,
) -> dict[str, Any]:
    """All there is to say about some files, as JSON values.

    files: a list of {path, model, depth, method, reward, simulations, summary (see `summary`),
        groups (see `group_summaries`), effects: a list of {op, start, length, times, damping, n,
        correct, n_log_likelihood, log_likelihood} (see `EditEffect`)}
    menus: a list, one a model, of {model, files, held_out_files, split, train, held_out, left_out,
        menus (see `menu_report`)}. Programs are ranked on `train` questions and tried on `held_out`
        others: those of the files named so ("files"; without the `left_out` ones that are among
        `train`), or part of the same file by `split_records`

    Raises InputError if a held-out file is of a model that no other file is of, or a menu size is
    below 1.
    """
    if not menu_sizes or min(menu_sizes) < 1:
        raise InputError(f"menu sizes are {list(menu_sizes)}; give at least one, each at least 1")
    models = list(dict.fromkeys(_model(file) for file in files))
    if other := next((file for file in held_out if _model(file) not in models), None):
        raise InputError(
            f"{other.path} is of model {other.header.model[:12]} with {other.header.depth} "
            "layers, which no menu is ranked on, or of other prompts; hold out a file of the "
            "same model and prompts"
        )
    menus = [
        _menus(_of_model(files, model), _of_model(held_out, model), sizes=menu_sizes)
        for model in models
    ]
    return {"files": list(map(_file_report, files)), "menus": menus}


def _file_report(file: SearchFile) -> dict[str, Any]:
    header = file.header
    return {
        "path": file.path,
        "model": header.model,
        "depth": header.depth,
        "method": header.config.method,
        "reward": header.config.reward,
        "simulations": header.config.simulations,
        "summary": summary(file.records),
        "groups": group_summaries(file.records),
        "effects": [asdict(effect) for effect in edit_effects(file.records)],
    }


def _model(file: SearchFile) -> _Model:
    """Of what verdicts may be put together: one model, asked and judged in one way."""
    return (
        file.header.model,
        file.header.depth,
        json.dumps(dict(file.header.prompt), sort_keys=True),
    )


def _of_model(files: Sequence[SearchFile], model: _Model) -> list[SearchFile]:
    return [file for file in files if _model(file) == model]


def _menus(
    files: Sequence[SearchFile], held_out_files: Sequence[SearchFile], *, sizes: Sequence[int]
) -> dict[str, Any]:
    train, left_out = merge(_all_records(files)), 0
    if held_out_files:
        known = {key(record) for record in train}
        others = merge(_all_records(held_out_files))
        held_out, how = [record for record in others if key(record) not in known], "files"
        left_out = len(others) - len(held_out)
    else:
        train, held_out, how = split_records(train)
    return {
        "model": files[0].header.model,
        "files": _paths(files),
        "held_out_files": _paths(held_out_files),
        "split": how,
        "train": len(train),
        "held_out": len(held_out),
        "left_out": left_out,
        "menus": menu_report(train, held_out, ks=sorted(set(sizes))),
    }


def _paths(files: Sequence[SearchFile]) -> list[str]:
    return [file.path for file in files]


def _all_records(files: Sequence[SearchFile]) -> Iterator[SearchRecord]:
    return (record for file in files for record in file.records)

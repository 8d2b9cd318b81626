"""Questions in tiers of difficulty, as the paper's protocol asks them: read from files whose lines
name a tier, dealt into splits, and written in an order in which any first part has all tiers alike.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..output.files import write_whole
from .questions import own_split

if TYPE_CHECKING:
    from ..questions import Question, Split

# How files name the splits, beside their own names.
_SPLITS: "dict[str, Split]" = {
    **{name: name for name in ("train", "validation", "test")},
    **dict.fromkeys(("val", "valid", "dev"), "validation"),
}
_LEAST = 2  # questions of each tier for each split


@dataclass(frozen=True, kw_only=True)
class TierQuestions:
    """Questions whose task is their tier, each with its split.

    `left_out` train questions had one of the `named` ids that were to be left out, and `repeated`
    ones the text of a validation or test question; neither are among the questions. With
    `is_divided`, half of the validation questions became the test, for want of test questions.
    """

    questions: "tuple[Question, ...]"
    named: int
    left_out: int
    repeated: int
    is_divided: bool

    @property
    def there(self) -> "dict[Split, int]":
        """How many questions there are for each split."""
        found: dict[Split, int] = {"train": 0, "validation": 0, "test": 0}
        for question in self.questions:
            found[own_split(question)] += 1
        return found

    def facts(self) -> dict[str, Any]:
        """JSON values: the numbers of questions, by tier and split, and what was left out."""
        counts = Counter((q.task, own_split(q)) for q in self.questions)
        tiers = sorted({tier for tier, _ in counts})
        by_tier: dict[str, dict[str, int]] = {tier: {} for tier in tiers}
        for tier, of_tier in by_tier.items():
            of_tier |= {split: counts[tier, split] for split in self.there}
        return {
            "tiers": by_tier,
            "ids_to_leave_out": self.named,
            "left_out": self.left_out,
            "repeated": self.repeated,
            "is_divided": self.is_divided,
        }

    def write(self, path: Path) -> Path:
        """As JSON lines that `load_jsonl` reads. Raises InputError."""
        lines = [json.dumps(_row(question), ensure_ascii=False) for question in self.questions]
        return write_whole("".join(f"{line}\n" for line in lines).encode(), path)


def read_tiers(
    data: Sequence[Path], leave_out: Path | None = None, *, seed: int = 0
) -> TierQuestions:
    """Questions of JSON lines, each of which has a `tier`; train questions whose id is a line of
    `leave_out` are left out.

    `seed` is of the order within a tier. Raises InputError for files that cannot be read, a line
    without a tier or with choices, an id that is there twice, or too few questions of a tier.
    """
    every = [question for path in data for question in _with_tiers(path)]
    names = _ids(leave_out) if leave_out is not None else set()
    left = [q for q in every if not (q.split == "train" and q.id in names)]
    if names.isdisjoint(q.id for q in every) and names:
        raise InputError(
            f"none of the {len(names)} ids to leave out, such as {min(names)!r}, is an id of the "
            "data; name the ids as the data has them"
        )
    counts = Counter(q.id for q in left)
    if twice := next((name for name, n in counts.items() if n > 1), None):
        raise InputError(
            f"two lines of the data have the id {twice!r}; make ids unique, or name those of "
            "one file as ids to leave out"
        )
    held_out = {q.question for q in left if q.split != "train"}
    apart = [q for q in left if q.split != "train" or q.question not in held_out]
    is_divided = not any(q.split == "test" for q in apart)
    if is_divided:
        apart = list(_divided(apart, seed))
    _check_enough(apart)
    return TierQuestions(
        questions=tuple(_in_turns(apart, seed)),
        named=len(names),
        left_out=len(every) - len(left),
        repeated=len(left) - len(apart),
        is_divided=is_divided,
    )


def _with_tiers(path: Path) -> "Iterator[Question]":
    from ..questions import load_jsonl

    questions = load_jsonl(path)  # checks all lines
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for question, (number, line) in zip(questions, numbered, strict=True):
        row = json.loads(line)
        tier = row.get("tier")
        if isinstance(tier, bool) or not isinstance(tier, int | str) or not str(tier).strip():
            raise InputError(
                f"{path}, line {number}: its tier is {tier!r}; the paper's protocol compares tiers "
                'of difficulty: give each line a "tier", a number or a text'
            )
        if question.choices:
            raise InputError(
                f"{path}, line {number}: it has choices; the paper's protocol asks for answers "
                "that are written: name files without choices"
            )
        split = _SPLITS.get(str(row.get("split")).strip().lower()) or question.split
        if split is None and row.get("split") is not None:  # never a test question in training
            raise InputError(
                f"{path}, line {number}: its split is {row['split']!r}; name train, validation or "
                "test, or leave splits out, so that ids decide"
            )
        task = f"tier {str(tier).strip()}"
        yield replace(question, task=task, cell="", split=split or own_split(question))


def _ids(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read ids to leave out from {path}: {error}; name a text file with an id a line"
        ) from error
    found = {line.strip() for line in lines} - {""}
    if not found:
        raise InputError(f"{path} names no ids to leave out; name a text file with an id a line")
    return found


def _by_tier(questions: "Sequence[Question]", seed: int) -> "list[list[Question]]":
    """Those of each tier, in an order drawn by the seed."""
    tiers: dict[str, list[Question]] = {}
    for question in questions:
        tiers.setdefault(question.task, []).append(question)
    for tier, members in tiers.items():
        members.sort(key=lambda q: q.id)
        random.Random(f"{seed}:{tier}").shuffle(members)
    return [tiers[tier] for tier in sorted(tiers)]


def _in_turns(questions: "Sequence[Question]", seed: int) -> "Iterator[Question]":
    """Of each split, one of each tier after the other, until there is none."""
    for split in ("train", "validation", "test"):
        of_split = [q for q in questions if q.split == split]
        turns = chain.from_iterable(zip_longest(*_by_tier(of_split, seed)))
        yield from (question for question in turns if question is not None)


def _divided(questions: "Sequence[Question]", seed: int) -> "Iterator[Question]":
    """With every second validation question of a tier, drawn, for the test."""
    yield from (q for q in questions if q.split == "train")
    for members in _by_tier([q for q in questions if q.split == "validation"], seed):
        yield from members[::2]
        yield from (replace(q, split="test") for q in members[1::2])


def _check_enough(questions: "Sequence[Question]") -> None:
    counts = Counter((q.task, own_split(q)) for q in questions)
    for tier in sorted({tier for tier, _ in counts}):
        for split in ("train", "validation", "test"):
            if (found := counts[tier, split]) < _LEAST:
                raise InputError(
                    f"{found} questions of {tier} are for {split}, and at least {_LEAST} are "
                    'needed (where none is for the test, half of validation is): name the "split" '
                    "of each line (train, validation or test), or other files"
                )


def _row(question: "Question") -> dict[str, Any]:
    return {
        "id": question.id,
        "task": question.task,
        "question": question.question,
        "answer": list(question.answers),
        "difficulty": question.difficulty,
        "split": question.split,
    }

"""Dense labels: every program of a list on every question, so that no program is right or wrong by
not having been tried.

Shape legend: N questions, K programs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..output.digest import digest
from ..program import Program
from ..questions.question import EncodedQuestion, Question, digest_of
from ..search.config import SearchConfig
from ..search.records.record_file import RecordReader, RecordStore
from ..search.records.records import SearchHeader, SearchRecord

Rows = Sequence[tuple[Question, EncodedQuestion]]


@dataclass(frozen=True, eq=False)
class VerdictTable:
    """`right` bool[N, K], and `log_likelihood` f64[N, K] of the accepted answer (NaN where answers
    were generated).

    The identity is the first program.
    """

    questions: tuple[Question, ...]
    programs: tuple[Program, ...]
    right: np.ndarray
    log_likelihood: np.ndarray

    @classmethod
    def of(
        cls, records: Iterable[SearchRecord], programs: Sequence[Program] | None = None
    ) -> "VerdictTable":
        """The table of records that looked at the same programs (`programs` None), or of these
        programs in them.

        Raises InputError naming a question and a program it has no verdict of, and if there is no
        record.
        """
        rows = list(records)
        if not rows:
            raise InputError(
                "there are no verdicts: no question was asked; ask some, of a split that has them"
            )
        depth = rows[0].depth
        if programs is None:
            programs = [each.program for each in rows[0].explored]
        identity = Program.identity(depth)
        wanted = tuple(dict.fromkeys([identity, *programs]))
        right = np.zeros((len(rows), len(wanted)), dtype=bool)
        likelihood = np.full((len(rows), len(wanted)), np.nan)
        for i, record in enumerate(rows):
            known = record.verdicts
            for k, program in enumerate(wanted):
                verdict = known.get(program)
                if verdict is None:
                    raise InputError(
                        f"question {record.question.id!r} has no verdict of program {program}; a "
                        "dense label needs every program on every question: judge them all with "
                        "`listed_records`"
                    )
                right[i, k] = verdict.correct
                if verdict.log_likelihood is not None:
                    likelihood[i, k] = verdict.log_likelihood
        return cls(tuple(r.question for r in rows), wanted, right, likelihood)

    @property
    def question_ids(self) -> list[str]:
        """N ids."""
        return [question.id for question in self.questions]

    @property
    def steps(self) -> np.ndarray:
        """f64[K]."""
        return np.array([p.num_steps for p in self.programs], dtype=np.float64)

    @property
    def depth(self) -> int:
        return self.programs[0].depth

    def choose(self, programs: Sequence[Program]) -> "VerdictTable":
        """Some of its programs, the identity first."""
        wanted = tuple(dict.fromkeys([self.programs[0], *programs]))
        where = [self.programs.index(p) for p in wanted]
        return VerdictTable(
            self.questions, wanted, self.right[:, where], self.log_likelihood[:, where]
        )

    def rows(self, where: np.ndarray) -> "VerdictTable":
        """Some of its questions, by a mask bool[N] or indices."""
        at = np.flatnonzero(where) if where.dtype == bool else where
        return VerdictTable(
            tuple(self.questions[i] for i in at),
            self.programs,
            self.right[at],
            self.log_likelihood[at],
        )

    def beside(self, other: "VerdictTable") -> "VerdictTable":
        """Both tables' programs, of the questions they share in the same order.

        Raises InputError if those differ.
        """
        if self.question_ids != other.question_ids:
            raise InputError(
                "two verdict tables are of different questions; ask both the same ones, in one "
                "order"
            )
        new = [k for k, p in enumerate(other.programs) if p not in self.programs]
        return VerdictTable(
            self.questions,
            (*self.programs, *(other.programs[k] for k in new)),
            np.hstack([self.right, other.right[:, new]]),
            np.hstack([self.log_likelihood, other.log_likelihood[:, new]]),
        )

    def above(self, other: "VerdictTable") -> "VerdictTable":
        """Both tables' questions, of this one's programs.

        Raises InputError if the other lacks one, or shares a question.
        """
        if twice := set(self.question_ids) & set(other.question_ids):
            raise InputError(
                f"question {min(twice)!r} is in both verdict tables; join tables of different "
                "questions"
            )
        if missing := [p for p in self.programs if p not in other.programs]:
            raise InputError(
                f"the other verdict table lacks program {missing[0]}; run it on those questions "
                "as well"
            )
        same = other.choose(self.programs)
        return VerdictTable(
            (*self.questions, *same.questions),
            self.programs,
            np.vstack([self.right, same.right]),
            np.vstack([self.log_likelihood, same.log_likelihood]),
        )

    def tasks(self) -> np.ndarray:
        """Number of each question's task, i64[N], in order of first appearance."""
        names: dict[str, int] = {}
        return np.array([names.setdefault(q.task, len(names)) for q in self.questions])

    def groups(self) -> np.ndarray:
        """Number of each question's task and cell, i64[N], in order of first appearance."""
        names: dict[tuple[str, str], int] = {}
        return np.array([names.setdefault((q.task, q.cell), len(names)) for q in self.questions])


# run(rows, programs by question id): a record a question, as they finish.
RunListed = Callable[[Rows, Mapping[str, tuple[Program, ...]]], Iterable[SearchRecord]]


def listed_records(
    path: Path,
    rows: Rows,
    *,
    programs: Mapping[str, tuple[Program, ...]],
    model: str,
    depth: int,
    prompt: dict[str, Any],
    run: RunListed,
    progress: Callable[[int, int], None] | None = None,
) -> list[SearchRecord]:
    """Each question's own list of programs on it, kept in a record file at `path` and gone on with
    where it ends.

    `rows` are questions with their encoded form; `programs` by question id. `progress(done, total)`
    is called after each question. Raises RecordFileError if the file is of other questions,
    programs or another model.
    """
    config = SearchConfig(method="listed", simulations=max(1, *map(len, programs.values())))
    texts = {name: list(map(str, listed)) for name, listed in programs.items()}
    asked = {
        "questions": len(rows),
        "sha256": digest_of(question for question, _ in rows),
        "programs": digest(texts),
    }
    with RecordStore.open(path, SearchHeader(model, depth, config, asked, prompt)) as store:
        left = [row for row in rows if row[0].id not in store.done]
        if left:
            for number, record in enumerate(run(left, programs), len(rows) - len(left) + 1):
                store.append(record)
                if progress is not None:
                    progress(number, len(rows))
    by_id = {record.question.id: record for record in RecordReader(path)}
    return [by_id[q.id] for q, _ in rows]

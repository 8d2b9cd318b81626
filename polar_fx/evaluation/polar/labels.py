"""From the programs that answer a question to what PoLar's network is trained on (PoLar, section
3).

Shapes: N label rows, D depth (layers), O op classes. Op class c runs its segment c times: 0 skip, 1
keep, 2 repeat.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import InputError, NotSegmentableError
from ...program import Op, Program

MAX_LENGTH = 4
"""K_max: most layers of a segment."""


@dataclass(frozen=True, slots=True)
class ProgramLabels:
    """A program as the network's targets; both tuples have an entry a layer."""

    boundaries: tuple[int, ...]
    """z_seg: 1 where a segment starts, else 0. The first is always 1."""
    ops: tuple[int, ...]
    """z_op as classes.

    They count at starts only; the other layers of a segment have its class too.
    """


@dataclass(frozen=True, slots=True)
class QuestionPrograms:
    """What a search found for one question: whether the identity is right, and the other programs
    that are.
    """

    question: str
    """The question's id."""
    identity_correct: bool
    valid: tuple[Program, ...]


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One program to learn for one question. The weights of a question's rows add up to 1."""

    question: str
    program: Program
    labels: ProgramLabels
    weight: float


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """What became of the questions and of their valid programs, the identity included."""

    questions: int
    unanswered: int
    """Questions no program answers; they give no row."""
    unlabelled: int
    """Questions that programs answer, but none that segments can express; they give no row."""
    rows: int
    unparsable: int
    """Programs no segments within the limits express (or damped ones, which labels cannot say)."""
    left_out: int
    """Programs beyond `max_paths` of a question."""


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Rows in the order of the questions, and the account of what gave none."""

    rows: tuple[LabelRow, ...]
    counts: LabelCounts


def parse_labels(
    program: Program | Sequence[int],
    depth: int | None = None,
    *,
    max_length: int = MAX_LENGTH,
    repeat_times: int = 2,
) -> ProgramLabels:
    """Return (z_seg, z_op) of a program, or of a path over `depth` layers (PoLar, section 3).

    Segments have at most `max_length` layers and repeats run exactly 2 to `repeat_times` times. Of
    all segmentations that run the program this is the one with the fewest segments, then the fewest
    skips, then the most repeats, then larger segments earlier. Raises NotSegmentableError if there
    is none, or if a repeat is damped; ProgramError if a path is none of `depth` layers; InputError
    if a path comes without a depth.
    """
    if not isinstance(program, Program):
        if depth is None:
            raise InputError(
                f"a path of {len(program)} steps came without depth; give the model's number of "
                "layers"
            )
        program = Program.from_path(program, depth)
    # How often a layer runs tells its op, and a repeat's length is the distance to its first
    # layer's second run. Only where runs of kept or skipped layers are cut is open, so `segments`
    # meets all ties by cutting the longest pieces first.
    boundaries: list[int] = []
    ops: list[int] = []
    for segment in program.segments(max_length, max_times=repeat_times):
        if segment.damping < 1:
            raise NotSegmentableError(
                f"labels have no damping, but layers {segment.start}:{segment.stop} repeat with "
                f"{segment.damping}; leave the program out, or repeat undamped"
            )
        boundaries += [1] + [0] * (segment.num_layers - 1)
        ops += [0 if segment.op is Op.SKIP else segment.times] * segment.num_layers
    return ProgramLabels(tuple(boundaries), tuple(ops))


def label_rows(
    questions: Iterable[QuestionPrograms],
    depth: int,
    *,
    max_paths: int = 50,
    identity_weight: float = 0.3,
    max_length: int = MAX_LENGTH,
    repeat_times: int = 2,
    seed: int = 0,
) -> LabelSet:
    """Return a row for each valid program of each question (PoLar, section 3).

    Where the identity is right it is a row as well; it weighs `identity_weight` of another row if
    the question has a valid program shorter than `depth`, parsable or not. Weights are scaled so
    that each question has 1 in all. Of more than `max_paths` programs the identity stays, and the
    others are drawn by a hash of `seed`, question and program: the same ones in any order of the
    search, and not the ones a search happens to find first.

    Raises InputError on settings out of range, a question given twice, a program of another depth,
    and an identity among the valid programs of a question whose identity is wrong.
    """
    if isinstance(max_paths, bool) or not isinstance(max_paths, int) or max_paths < 1:
        raise InputError(f"max_paths is {max_paths!r}; give a whole number of at least 1")
    if not 0 < identity_weight <= 1:
        raise InputError(
            f"identity_weight is {identity_weight!r}; give a number above 0 and at most 1"
        )
    identity = Program.identity(depth)
    rows: list[LabelRow] = []
    seen: set[str] = set()
    unanswered = unlabelled = unparsable = left_out = 0
    for each in questions:
        if each.question in seen:
            raise InputError(
                f"question {each.question!r} came twice; give all its programs at once"
            )
        seen.add(each.question)
        programs = _valid_programs(each, identity)
        labels: dict[Program, ProgramLabels] = {}
        for program in programs:
            try:
                labels[program] = parse_labels(
                    program, max_length=max_length, repeat_times=repeat_times
                )
            except NotSegmentableError:
                unparsable += 1
        unanswered += not programs
        unlabelled += bool(programs) and not labels
        chosen = _choose(each.question, list(labels), identity=identity, limit=max_paths, seed=seed)
        left_out += len(labels) - len(chosen)
        is_shorter = any(program.num_steps < depth for program in programs)
        weights = [
            identity_weight if is_shorter and program == identity else 1.0 for program in chosen
        ]
        total = sum(weights)
        rows += [
            LabelRow(each.question, p, labels[p], w / total)
            for p, w in zip(chosen, weights, strict=True)
        ]
    return LabelSet(
        tuple(rows), LabelCounts(len(seen), unanswered, unlabelled, len(rows), unparsable, left_out)
    )


def label_tensors(rows: Sequence[LabelRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Return boundaries float32 [N, D], ops int64 [N, D] and weights float32 [N].

    Raises InputError if there are no rows.
    """
    if not rows:
        raise InputError("no label rows; search questions that some program answers")
    boundaries = torch.tensor([row.labels.boundaries for row in rows], dtype=torch.float32)
    ops = torch.tensor([row.labels.ops for row in rows], dtype=torch.int64)
    return boundaries, ops, torch.tensor([row.weight for row in rows], dtype=torch.float32)


def label_losses(
    boundary_logits: Tensor, op_logits: Tensor, *, boundaries: Tensor, ops: Tensor
) -> tuple[Tensor, Tensor]:
    """Return boundary loss [N] and op loss [N] of each row; their sum is the loss of PoLar, section
    3.

    Logits [N, D] and [N, D, O] with targets [N, D] (0 or 1) and [N, D] (classes). The boundary loss
    is the mean binary cross-entropy over layers 1..D-1, because layer 0 always starts a segment; at
    D = 1 it is 0. The op loss is the mean cross-entropy over the row's true segment starts: over a
    row, not over the batch, so that programs of many segments weigh no more than others. The paper
    writes sums; means, as in its published code, weigh ops more by (D - 1) / starts.
    """
    boundary_loss = functional.binary_cross_entropy_with_logits(
        boundary_logits[:, 1:], boundaries[:, 1:].to(boundary_logits.dtype), reduction="none"
    )
    # A mean over no layers would be NaN.
    boundary_loss = boundary_loss.sum(dim=1) / max(boundary_loss.shape[1], 1)
    starts = boundaries.to(op_logits.dtype)
    op_loss = functional.cross_entropy(op_logits.transpose(1, 2), ops, reduction="none")  # [N, D]
    return boundary_loss, (op_loss * starts).sum(dim=1) / starts.sum(dim=1)


def _valid_programs(question: QuestionPrograms, identity: Program) -> list[Program]:
    """All programs that are right, each once, the identity first."""
    for program in question.valid:
        if program.depth != identity.depth:
            raise InputError(
                f"program {program} of question {question.question!r} has depth {program.depth}, "
                f"not {identity.depth}; make labels of one model at a time"
            )
    if not question.identity_correct and identity in question.valid:
        raise InputError(
            f"question {question.question!r} has the identity among its valid programs and "
            "identity_correct=False; one of them is wrong"
        )
    return list(
        dict.fromkeys(([identity] if question.identity_correct else []) + list(question.valid))
    )


def _choose(
    question: str, programs: list[Program], *, identity: Program, limit: int, seed: int
) -> list[Program]:
    """At most `limit` of the programs, in their order."""
    if len(programs) <= limit:
        return programs

    def draw(program: Program) -> tuple[bool, bytes]:
        text = f"{seed}\n{question}\n{program.fingerprint}"
        return program != identity, hashlib.sha256(text.encode()).digest()

    chosen = set(sorted(programs, key=draw)[:limit])
    return [program for program in programs if program in chosen]

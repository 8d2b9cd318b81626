"""From the network's logits to programs: PoLar's beam search, and two exact alternatives (PoLar,
section 3).

Shapes: D depth (layers), O op classes. Op class c runs its segment c times: 0 skip, 1 keep, 2
repeat.

One measure for all three: the log-probability of a segmentation with ops is the sum of log
P(boundary bit) over layers 1..D-1 (layer 0 always starts a segment) and of log P(op) at the segment
starts. A program that several segmentations run has that of its best one.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...errors import InputError
from ...program import Program
from .labels import MAX_LENGTH


@dataclass(frozen=True, slots=True)
class Decoded:
    """A program and the log-probability of its best segmentation and ops that were looked at."""

    program: Program
    log_probability: float


def segment_starts(
    boundary_logits: Tensor, *, threshold: float = 0.5, max_length: int = MAX_LENGTH
) -> tuple[int, ...]:
    """Return the layers where segments start (PoLar, section 3).

    These are layer 0, layers whose sigmoid of `boundary_logits` [D] is at least `threshold`, and as
    many more as it takes that no segment has more than `max_length` layers, placed `max_length`
    after the start before. Raises InputError.
    """
    _check_positive("max_length", max_length)
    probabilities = _floating("boundary_logits", boundary_logits, dims=1).sigmoid().tolist()
    starts = [0]
    for layer in range(1, len(probabilities)):
        if probabilities[layer] >= threshold or layer - starts[-1] == max_length:
            starts.append(layer)
    return tuple(starts)


def decode_beam(
    boundary_logits: Tensor,
    op_logits: Tensor,
    *,
    beam: int = 5,
    top_ops: int = 2,
    threshold: float = 0.5,
    max_length: int = MAX_LENGTH,
) -> list[Decoded]:
    """Return at most `beam` programs, best first: thresholded boundaries, then a beam search over
    ops (PoLar, section 3).

    Logits are [D] and [D, O]. All programs share one segmentation, and each segment takes one of
    its `top_ops` most probable ops, read at its first layer; where a boundary was inserted for
    `max_length`, that layer may never have been a start in training. Skipping every layer means the
    identity, and programs are distinct. Raises InputError.
    """
    _check_positive("beam", beam)
    _check_positive("top_ops", top_ops)
    scores = _Scores(boundary_logits, op_logits, max_length=max_length)
    starts = segment_starts(boundary_logits, threshold=threshold, max_length=max_length)
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for start, stop in zip(starts, (*starts[1:], scores.depth), strict=True):
        segments = [
            (scores.segment(start, stop, op=op), tuple(range(start, stop)) * op)
            for op in range(scores.ops)
        ]
        # Of one segment all ops share the boundary bits, so the best segments have the most
        # probable ops.
        best = heapq.nlargest(top_ops, segments, key=_score)
        beams = heapq.nlargest(
            beam, [(a + b, path + part) for a, path in beams for b, part in best], key=_score
        )
    return _rank(beams, scores.depth)


def decode_joint(
    boundary_logits: Tensor, op_logits: Tensor, *, count: int = 5, max_length: int = MAX_LENGTH
) -> list[Decoded]:
    """Return the `count` most probable distinct programs, best first, over all segmentations and
    ops together.

    Logits are [D] and [D, O]. A semi-Markov dynamic program over segments of 1..`max_length`
    layers: exact, and unlike `decode_beam` its programs may differ in their segments. Skipping
    every layer means the identity. Fewer than `count` come back only if there are no more. Raises
    InputError.
    """
    _check_positive("count", count)
    scores = _Scores(boundary_logits, op_logits, max_length=max_length)
    # One more than asked for, because the empty program may be among the best and then falls to the
    # identity.
    keep = count + 1
    # best[layer]: the likeliest distinct paths of the layers before it. A path that is not among
    # them ends in no program that is, since each of the better ones, continued in the same way,
    # gives a better program of its own.
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())]]
    for stop in range(1, scores.depth + 1):
        found: dict[tuple[int, ...], float] = {}
        for start in range(max(0, stop - max_length), stop):
            for op in range(scores.ops):
                part, score = tuple(range(start, stop)) * op, scores.segment(start, stop, op=op)
                for before, path in best[start]:
                    whole = path + part
                    found[whole] = max(found.get(whole, -math.inf), before + score)
        best.append(
            heapq.nlargest(keep, ((score, path) for path, score in found.items()), key=_score)
        )
    return _rank(best[-1], scores.depth)[:count]


def decode_budget(
    boundary_logits: Tensor,
    op_logits: Tensor,
    *,
    budget: int,
    exact: bool = True,
    max_length: int = MAX_LENGTH,
) -> Decoded:
    """Return the most probable program that executes exactly `budget` layers, repeats counted; at
    most, if not `exact`.

    Logits are [D] and [D, O]. A dynamic program over layers and steps used, exact over all
    segmentations and ops. The empty program is never the answer. Raises InputError if `budget` is
    not 1 to D times the largest class.
    """
    scores = _Scores(boundary_logits, op_logits, max_length=max_length)
    _check_positive("budget", budget)
    most = scores.depth * (scores.ops - 1)
    if budget > most and exact:
        raise InputError(
            f"budget is {budget}, but {scores.depth} layers run {most} steps at most; give 1 to "
            f"{most}"
        )
    limit = min(budget, most)
    # best[layer][used]: the score, and the segment that ends there, of the likeliest way to use so
    # many steps before layer.
    best: list[dict[int, tuple[float, int, int]]] = [{0: (0.0, 0, 0)}]
    for stop in range(1, scores.depth + 1):
        row: dict[int, tuple[float, int, int]] = {}
        for start in range(max(0, stop - max_length), stop):
            for op in range(scores.ops):
                score, added = scores.segment(start, stop, op=op), op * (stop - start)
                for used, (before, _, _) in best[start].items():
                    if (
                        used + added <= limit
                        and before + score > row.get(used + added, (-math.inf,))[0]
                    ):
                        row[used + added] = (before + score, start, op)
        best.append(row)
    ends = [limit] if exact else [used for used in best[-1] if used]
    used = max(ends, key=lambda each: best[-1][each][0])
    log_probability, path, layer = best[-1][used][0], (), scores.depth
    while layer:
        _, start, op = best[layer][used]
        path = tuple(range(start, layer)) * op + path
        used -= op * (layer - start)
        layer = start
    return Decoded(Program.from_path(path, scores.depth), log_probability)


class _Scores:
    """Log-probabilities of segments: boundary bits and op together."""

    def __init__(self, boundary_logits: Tensor, op_logits: Tensor, *, max_length: int) -> None:
        _check_positive("max_length", max_length)
        boundaries, ops = (
            _floating("boundary_logits", boundary_logits, dims=1),
            _floating("op_logits", op_logits, dims=2),
        )
        if len(ops) != len(boundaries) or ops.shape[1] < 2:
            raise InputError(
                f"op_logits have shape {list(ops.shape)}; give [{len(boundaries)}, classes], a "
                "row for each boundary logit, with a class for skip and keep at least"
            )
        self.depth, self.ops = ops.shape
        self._op = ops.log_softmax(dim=-1).tolist()
        # Layer 0 is a start whatever its logit says.
        self._is_start = [0.0, *torch.nn.functional.logsigmoid(boundaries[1:]).tolist()]
        inside = [0.0, *torch.nn.functional.logsigmoid(-boundaries[1:]).tolist()]
        self._inside = list(accumulate(inside, initial=0.0))  # [i]: of layers before i

    def segment(self, start: int, stop: int, *, op: int) -> float:
        """Of layers start..stop-1 as one segment with `op`."""
        return (
            self._is_start[start]
            + self._inside[stop]
            - self._inside[start + 1]
            + self._op[start][op]
        )


def _rank(found: Iterable[tuple[float, tuple[int, ...]]], depth: int) -> list[Decoded]:
    """The programs of paths, each once, best first; the empty path is the identity's."""
    best: dict[Program, float] = {}
    for score, path in found:
        program = Program.from_path(path, depth) if path else Program.identity(depth)
        best[program] = max(best.get(program, -math.inf), score)
    return [
        Decoded(program, score)
        for program, score in sorted(best.items(), key=lambda item: -item[1])
    ]


def _score(item: tuple[float, Sequence[int]]) -> float:
    return item[0]


def _floating(name: str, logits: Tensor, *, dims: int) -> Tensor:
    """The logits as float64 on the CPU, checked."""
    if logits.dim() != dims or not len(logits):
        shape = "[depth]" if dims == 1 else "[depth, classes]"
        raise InputError(
            f"{name} have shape {list(logits.shape)}; give {shape}, those of one question"
        )
    logits = logits.detach().to("cpu", torch.float64)
    if not bool(logits.isfinite().all()):
        layer = logits.isfinite().logical_not().nonzero()[0, 0].item()
        raise InputError(
            f"{name} of layer {layer} are not finite; the network diverged, train it with a lower "
            "learning rate"
        )
    return logits


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}; give a whole number of at least 1")

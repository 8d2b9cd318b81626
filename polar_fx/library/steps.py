"""How a program's steps run: what a call takes, how blends open and close, how a prefill ends.

Linked regions, rows in lock-step, whole programs, verdicts by teacher forcing and exported graphs
all follow this one rule, on tensors or on values of a graph. The interpreted step graph, which they
are tested against, does not use it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

# Takes operands as one list and returns the results, of a layer the hidden state first.
Code = Callable[[list[T]], Sequence[T]]

# The side values are the three graph inputs (ids, positions, KV columns), then the prologue's
# results. The first of these is the hidden state before the first step.
HIDDEN = 3


def side_values(prologue: Code[T], inputs: Sequence[T], *, weights: Sequence[T]) -> list[T]:
    """The side values, computed by the prologue from the three graph inputs."""
    return [*inputs, *prologue([*inputs, *weights])]


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """A call: its code, which side values and weights it takes, and the blends that open before and
    close after it (their dampings, the innermost first).

    The epilogue is a step without a slot and without blends.
    """

    code: Code[T]
    sides: Sequence[int]
    weights: Sequence[T]
    opens: int = 0
    closes: Sequence[float] = ()

    def operands(self, hidden: T, values: Sequence[T], *, slot: Sequence[T] = ()) -> list[T]:
        """What the call takes, in order: hidden state, side values, keys and values, weights."""
        return [hidden, *[values[i] for i in self.sides], *slot, *self.weights]

    def run(self, hidden: T, values: Sequence[T], *, slot: Sequence[T] = ()) -> T:
        """What the call makes of the hidden state, blends apart; it writes its slot."""
        return self.code(self.operands(hidden, values, slot=slot))[0]


class Blends(Generic[T]):
    """The hidden states that open blends wait for, the last one opened at the end.

    A blend takes the hidden state h before it and the state g after it to h + damping (g - h);
    `lerp` computes that: `torch.lerp` for tensors.
    """

    __slots__ = ("lerp", "saved")

    def __init__(self, lerp: Callable[[T, T, float], T], saved: Sequence[T] = ()) -> None:
        self.lerp, self.saved = lerp, list(saved)

    def open(self, hidden: T, count: int) -> None:
        """Open `count` blends at the hidden state before a step."""
        self.saved += [hidden] * count

    def close(self, hidden: T, dampings: Sequence[float]) -> T:
        """The hidden state after a step, once the innermost blends, one a damping, are closed."""
        for damping in dampings:
            hidden = self.lerp(self.saved.pop(), hidden, damping)
        return hidden

    def each(self, function: Callable[[T], T]) -> "Blends[T]":
        """The same blends over other states, such as those of fewer tokens."""
        return Blends(self.lerp, [function(state) for state in self.saved])


def states(
    steps: Sequence[Step[T]],
    hidden: T,
    *,
    values: Sequence[T],
    slots: Iterable[Sequence[T]],
    blends: Blends[T],
) -> Iterator[T]:
    """The hidden state after each step; a step runs when the state after it is asked for."""
    for step, slot in zip(steps, slots, strict=True):
        if step.opens:
            blends.open(hidden, step.opens)
        hidden = step.code(step.operands(hidden, values, slot=slot))[0]
        if step.closes:
            hidden = blends.close(hidden, step.closes)
        yield hidden


@dataclass(frozen=True, slots=True)
class Chain(Generic[T]):
    """The calls of one program, for the logits of every token or of one token a row.

    For one token a row, the last `num_last` steps and the head run for the tokens asked for, as if
    these were decoded; the first of them runs for all tokens before, but only as far as its keys
    and values (`kv_writes`), and those after it only read some. Without `kv_writes` all of them
    only read: a step that may keep a state must not see a token twice. `one` is the same program
    for one token. `slot_steps` tells, for each step, the one whose slot it takes; None: each has
    its own.
    """

    prologue: Code[T]
    prologue_weights: Sequence[T]
    steps: tuple[Step[T], ...]
    epilogue: Step[T] | None
    lerp: Callable[[T, T, float], T]
    kv_writes: Code[T] | None = None
    one: "Chain[T] | None" = None
    num_last: int = 0
    slot_steps: Sequence[int] | None = None

    def run(
        self,
        inputs: Sequence[T],
        slots: Sequence[Sequence[T]],
        *,
        pick: Callable[[T], T] | None = None,
        resume: tuple[int, T] | None = None,
    ) -> T:
        """Logits of every token, or of those that `pick` takes out of a value of all tokens.

        `inputs` are the three graph inputs; the slots are written in place. With `resume`, only the
        steps after the first resume[0] run, from the hidden state resume[1].
        """
        values, slots = self.start(inputs), self._taken(slots)
        if self.one is None:
            hidden, _ = self._through(self.steps, values, slots=slots, resume=resume)
            return self.head(hidden, values)
        assert pick is not None
        ids, positions, kv_index = inputs
        hidden, blends = self._all_but_last(values, slots, resume=resume)
        hidden, blends = pick(hidden), blends.each(pick)
        values = self.one.start([pick(ids), pick(positions), kv_index])
        first = self._first_last(resume)
        last, slots = self.one.steps[first:], slots[first:]
        for after in states(last, hidden, values=values, slots=slots, blends=blends):
            hidden = after
        return self.one.head(hidden, values)

    def write_kv(
        self,
        inputs: Sequence[T],
        slots: Sequence[Sequence[T]],
        *,
        resume: tuple[int, T] | None = None,
    ) -> None:
        """Write every step's keys and values, and compute nothing that only logits need.

        Of a chain for one token a row.
        """
        self._all_but_last(self.start(inputs), self._taken(slots), resume=resume)

    def states(self, values: Sequence[T], slots: Sequence[Sequence[T]]) -> Iterator[T]:
        """The hidden states before the first step and then after each; a step runs when the state
        after it is asked for.

        Of a chain for one token a row, all but the last `num_last`.
        """
        yield values[HIDDEN]
        taken = (slots[step] for step in self.slot_steps or range(len(slots)))
        yield from states(
            self.steps, values[HIDDEN], values=values, slots=taken, blends=Blends(self.lerp)
        )

    def start(self, inputs: Sequence[T]) -> list[T]:
        """The side values."""
        return side_values(self.prologue, inputs, weights=self.prologue_weights)

    def head(self, hidden: T, values: Sequence[T]) -> T:
        """The logits of hidden states after the last step."""
        assert self.epilogue is not None
        return self.epilogue.run(hidden, values)

    def _taken(self, slots: Sequence[Sequence[T]]) -> Sequence[Sequence[T]]:
        """The slot that each step takes."""
        return slots if self.slot_steps is None else [slots[step] for step in self.slot_steps]

    def _all_but_last(
        self, values: Sequence[T], slots: Sequence[Sequence[T]], *, resume: tuple[int, T] | None
    ) -> tuple[T, Blends[T]]:
        """The hidden state before the last steps, and the blends that are open there; all steps'
        keys and values are written.
        """
        first, begun = self._first_last(resume), 0 if resume is None else resume[0]
        steps = self.steps[:first]
        hidden, blends = self._through(steps, values, slots=slots[:first], resume=resume)
        if self.kv_writes is not None and begun <= len(self.steps) - self.num_last:
            self.kv_writes(self.steps[first].operands(hidden, values, slot=slots[first]))
        return hidden, blends

    def _first_last(self, resume: tuple[int, T] | None) -> int:
        """The number of the first step that runs for the tokens asked for alone."""
        return max(len(self.steps) - self.num_last, 0 if resume is None else resume[0])

    def _through(
        self,
        steps: Sequence[Step[T]],
        values: Sequence[T],
        *,
        slots: Sequence[Sequence[T]],
        resume: tuple[int, T] | None,
    ) -> tuple[T, Blends[T]]:
        """The hidden state after these steps, and the blends that are open there."""
        done, hidden = (0, values[HIDDEN]) if resume is None else resume
        blends = Blends(self.lerp)
        for after in states(steps[done:], hidden, values=values, slots=slots[done:], blends=blends):
            hidden = after
        return hidden, blends

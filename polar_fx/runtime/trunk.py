"""The trunk: first steps that all programs in question share, run before it is known which program
follows.

A dispatcher looks at the hidden states after them, chooses, and each row goes on from there with
its own program, on keys and values that are there already: nothing runs twice.

Shape legend: B batch, T tokens, d hidden size, n shared steps.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import ShapeClass
from ..capture.support import without_autocast
from ..errors import ProgramError
from ..program import Program
from .group_session import GroupSession, groups_of
from .kv_cache import KvSession, Resume
from .kv_rows import KvRow
from .link import StepInputs
from .lockstep_rows import RowBatch
from .lockstep_session import After, LockstepSession
from .on_device import on_device
from .runner import Runner, Session
from .token_rows import padded


@dataclass(frozen=True, eq=False)
class Trunk:
    """A batch after its first `num_steps` steps: layers 0 .. num_steps - 1, each once.

    `hidden` holds each row's hidden states [T, d], `held` the keys and values of these steps.
    `rows` are the rows of the batch it was run on that this one holds.
    """

    num_steps: int
    hidden: list[Tensor]
    held: KvSession | RowBatch
    rows: tuple[int, ...]

    def take(self, rows: Sequence[int]) -> "Trunk":
        """Some of its rows, in that order, repeated ones included; keys and values are not copied
        before they are used.
        """
        chosen = tuple(self.rows[r] for r in rows)
        return Trunk(self.num_steps, [self.hidden[r] for r in rows], self.held, chosen)


def shares_trunk(program: Program, num_steps: int) -> bool:
    """Whether the program runs layers 0 .. num_steps - 1 first, each once and undamped, and some
    step after them.
    """
    first = program.path[:num_steps] == tuple(range(num_steps))
    return (
        first
        and program.num_steps > num_steps
        and all(blend.start >= num_steps for blend in program.blends)
    )


def check_trunk(program: Program, num_steps: int) -> None:
    """Raise ProgramError unless the program shares the trunk."""
    if not shares_trunk(program, num_steps):
        raise ProgramError(
            f"program {program} does not begin with layers 0..{num_steps - 1} and go on after "
            "them; choose programs that do, or fewer shared steps"
        )


def trunk_program(num_steps: int, depth: int) -> Program:
    """The shared steps as a program; of none, the first one: a row has at least one step."""
    return Program.from_path(range(max(1, num_steps)), depth)


def go_on(row: KvRow, program: Program, *, num_steps: int) -> None:
    """Let a row that ran the trunk take the program that was chosen for it, which shares it."""
    row.switch(program, num_steps)
    row.length = 0  # the tokens have not gone through the other steps


@contextmanager
def run_trunk(runner: Runner, rows: list[Tensor], *, num_steps: int) -> Iterator[Trunk]:
    """The trunk of rows of token ids i64[T], whose keys and values are held until the end of the
    context.

    `num_steps` may be 0: the hidden states are then the embedded tokens. Raises KvOverflowError
    before anything runs, and ProgramError if the model has no layer after the trunk.
    """
    identity = Program.identity(runner.depth)
    check_trunk(identity, num_steps)
    numbers = tuple(range(len(rows)))
    if runner.together:
        runner.check_weights()
        first = trunk_program(num_steps, runner.depth)
        batch = RowBatch([runner.lockstep.row(first) for _ in rows])
        with LockstepSession(batch, runner.max_length) as session:
            session.require([len(r) for r in rows])
            yield Trunk(
                num_steps, runner.hidden(session, rows, num_steps=num_steps), batch, numbers
            )
        return
    with runner.open_slots(identity, len(rows), steps=slice(num_steps)) as slots:
        slots.require([len(r) for r in rows])
        if runner.deterministic and len(rows) > 1:
            hidden = [
                _hidden(runner, slots.row(i), rows=[rows[i]], num_steps=num_steps)[0]
                for i in numbers
            ]
        else:
            hidden = _hidden(runner, slots, rows=rows, num_steps=num_steps)
        yield Trunk(num_steps, hidden, slots, numbers)


@torch.no_grad()
def _hidden(
    runner: Runner, session: KvSession, *, rows: list[Tensor], num_steps: int
) -> list[Tensor]:
    """Each row's hidden states [T, d] after the first steps of the identity."""
    found: list[list[Tensor]] = [[] for _ in rows]
    with without_autocast(runner.device):
        for ids, counts in runner.chunks(rows):
            shape = ShapeClass.of(ids.shape[0], ids.shape[1], runner.pool.length)
            # as a prefill asks for it, where it runs these steps for all tokens: nothing more to
            # compile
            num_last, _ = runner.library.table.ending(session.program.path)
            every = shape.tokens == 1 or num_steps > runner.depth - num_last
            linked = runner.linker.link(session.program, shape, every=every)
            positions = session.positions(counts, ids.shape[1])
            states = linked.states(StepInputs.of(session, ids, positions=positions))
            hidden = next(itertools.islice(states, num_steps, None))
            session.advance(counts)
            for of_row, own, count in zip(found, hidden, counts, strict=True):
                if count:
                    of_row.append(own[:count])
    return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in found]


def session_after(
    runner: Runner, programs: Sequence[Program], *, trunk: Trunk
) -> AbstractContextManager[Session]:
    """A session for the trunk's rows, a program each, which holds the trunk's keys and values.

    Prefill it with the same rows: only the steps after the trunk will run. Raises ProgramError for
    a program that does not share the trunk.
    """
    for program in set(programs):
        check_trunk(program, trunk.num_steps)
    if isinstance(trunk.held, RowBatch):
        return _rows_after(runner, programs, trunk=trunk, held=trunk.held)
    groups = groups_of(programs)
    if len(groups) == 1:
        return _slots_after(runner, programs[0], trunk=trunk, lent=trunk.held)
    opened = [
        (members, _slots_after(runner, program, trunk=trunk.take(members), lent=trunk.held))
        for program, members in groups.items()
    ]
    return GroupSession(opened, runner.max_length)


def _rows_after(
    runner: Runner, programs: Sequence[Program], *, trunk: Trunk, held: RowBatch
) -> LockstepSession:
    """Branches of the trunk's rows, which go on with other programs."""
    rows: list[KvRow] = []
    try:
        for number, program in zip(trunk.rows, programs, strict=True):
            rows.append(held.rows[number].branch())
            go_on(rows[-1], program, num_steps=trunk.num_steps)
    except BaseException:
        for row in rows:
            row.close()
        raise
    return LockstepSession(
        RowBatch(rows), runner.max_length, after=After(trunk.num_steps, trunk.hidden)
    )


@contextmanager
def _slots_after(
    runner: Runner, program: Program, *, trunk: Trunk, lent: KvSession
) -> Iterator[KvSession]:
    """A trunk that is used as a whole lends its slots. They are copied of one that was split up,
    and of one that keeps states: decoding changes these, and the trunk may be used again.
    """
    resume = Resume(trunk.num_steps, padded(trunk.hidden))
    keeps_states = any(spec.states for spec in lent.specs)
    if trunk.rows == tuple(range(lent.batch)) and not keeps_states:
        with runner.open_slots(program, lent.batch, steps=slice(trunk.num_steps, None)) as rest:
            whole = KvSession(
                runner.pool,
                program,
                slots=lent.slots + rest.slots,
                specs=lent.specs + rest.specs,
                batch=lent.batch,
            )
            whole.resume = resume
            try:
                yield whole
            finally:
                for part in (lent, rest):
                    part.will_write(whole.num_written)
        return
    with runner.open_slots(program, len(trunk.rows)) as session:
        session.resume = resume
        length = max(map(len, trunk.hidden))
        rows = on_device(trunk.rows, runner.device)
        session.will_write(length)
        for spec, of_trunk, own in zip(lent.specs, lent.slots, session.slots, strict=False):
            held = spec.held(of_trunk, length), spec.held(own, length)
            for source, copy in zip(*held, strict=True):
                copy.copy_(source.index_select(0, rows))
        yield session

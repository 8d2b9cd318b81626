"""The rows that an engine runs: what each holds, and one pass over some of them.

Shape legend: B rows, T tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..program import Program
from ..runtime.dispatcher import Dispatcher
from ..runtime.kv_prefixes import KvPrefixes
from ..runtime.lockstep_rows import RowBatch
from ..runtime.lockstep_session import After, LockstepSession
from ..runtime.runner import Runner, Session
from ..runtime.token_rows import padded_count, padded_tokens
from ..runtime.trunk import check_trunk, go_on, run_trunk, session_after, trunk_program
from .request import Request

log = logging.getLogger("polar_fx.engine")


@dataclass(eq=False)
class Undecided:
    """What a dispatcher will choose a program by: the hidden states [T, d] of the prompt's parts
    after the steps that all programs share.
    """

    by: Dispatcher
    states: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """A request that runs: its keys and values, and how far its prompt is. While its program is not
    decided, the prompt runs the steps that all programs share.
    """

    request: Request
    session: Session
    prefilled: int = 0
    undecided: Undecided | None = None
    _held: ExitStack = field(default_factory=ExitStack)

    @property
    def is_prefilled(self) -> bool:
        return self.undecided is None and self.tokens_left == 0

    @property
    def tokens_left(self) -> int:
        """Tokens of its prompt that have not run."""
        return len(self.request.prompt) - self.prefilled

    @property
    def steps_done(self) -> int | None:
        """How many steps its prompt has made already, before the program was chosen."""
        after = self.session.after if isinstance(self.session, LockstepSession) else None
        return after and after.num_steps

    def joins(self, other: "Row") -> bool:
        """Whether both run the same steps of their prompts: one pass can serve them."""
        kinds = [(row.undecided is None, row.steps_done) for row in (self, other)]
        return kinds[0] == kinds[1]

    def close(self) -> None:
        """Give back what it holds."""
        self._held.close()


# Rows that ran, and logits [B, V] of what follows their last tokens, None if not wanted; or what
# failed, and all of them with it.
Outcome = tuple[Sequence[Row], Tensor | Exception | None]


class RowRunner:
    """Runs rows: in lock-step where the runner can (`Runner.together`), else one after another, a
    prompt as a whole.
    """

    def __init__(self, runner: Runner, kept_bytes: int) -> None:
        self.runner = runner
        self._batched: RowBatch | None = None  # of the last pass
        # where a prompt is cut decides the last bits of what follows
        kept_bytes = 0 if runner.deterministic or not runner.together else kept_bytes
        lockstep, specs = runner.lockstep, runner.library.table.kv_specs
        self.kept = KvPrefixes(
            lockstep.store, specs, windows=lockstep.windows, max_bytes=kept_bytes
        )
        self._version = 0  # of the weights that what is kept was computed with

    @property
    def in_chunks(self) -> bool:
        """Whether prompts run in parts, several of them in one pass."""
        return self.runner.together

    def open(self, request: Request, program: Program) -> Row:
        """A row that holds what is kept of its program and the beginning of its prompt.

        Raises WeightsReplacedError.
        """
        self._check_weights()
        runner = self.runner
        opened = runner.open_together([program]) if runner.together else runner.open(program, 1)
        row = self._row(request, ExitStack(), opened=opened)
        if isinstance(row.session, LockstepSession):
            # the last token runs in any case: its logits are wanted
            found = self.kept.find(program, request.prompt[:-1])
            if found is not None:
                row.session.rows.rows[0].adopt(found.blocks)
                row.prefilled = found.num_tokens
        return row

    def open_chosen(self, request: Request, by: Dispatcher) -> Row:
        """A row whose program will be chosen by what the steps that all programs share make of its
        prompt; where prompts do not run in parts, it is chosen at once.
        """
        self._check_weights()
        if self.runner.together:
            return self._undecided_row(request, by)
        with ExitStack() as held:
            prompt = [torch.tensor(request.prompt)]
            trunk = held.enter_context(run_trunk(self.runner, prompt, num_steps=by.num_steps))
            program = self._choose(request, by, hidden=trunk.hidden[0])
            # the row goes on in the slots of the trunk
            return self._row(
                request, held.pop_all(), opened=session_after(self.runner, [program], trunk=trunk)
            )

    def _choose(self, request: Request, by: Dispatcher, *, hidden: Tensor) -> Program:
        (decision,) = by.decide([hidden])
        request.program, request.probability = decision.program, decision.probability
        return decision.program

    def _undecided_row(self, request: Request, by: Dispatcher) -> Row:
        runner, undecided = self.runner, Undecided(by)
        first = trunk_program(by.num_steps, runner.depth)
        with ExitStack() as held:
            row = runner.lockstep.row(first)
            held.callback(row.close)
            if by.num_steps:
                found = self.kept.find(first, request.prompt[:-1], hidden=True)
                if found is not None and found.hidden is not None:
                    row.adopt(found.blocks)
                    undecided.states.append(found.hidden)
            session = LockstepSession(RowBatch([row]), runner.max_length)
            return Row(request, session, row.length, undecided, held.pop_all())

    def _decide(self, row: Row, undecided: Undecided) -> None:
        """Let a row whose prompt has made the shared steps go on with the program that is chosen
        by them. Raises ProgramError.
        """
        assert isinstance(row.session, LockstepSession)
        (held,), by, prompt = row.session.rows.rows, undecided.by, row.request.prompt
        states = torch.cat(undecided.states)
        if by.num_steps:
            self.kept.keep(held.program, prompt, table=held.table, hidden=states)
        program = self._choose(row.request, by, hidden=states)
        check_trunk(program, by.num_steps)
        go_on(held, program, num_steps=by.num_steps)
        if (found := self.kept.find(program, prompt[:-1])) is not None:
            held.adopt(found.blocks, by.num_steps)
        after = After(by.num_steps, [states])
        self._batched = None  # a batch knows the programs of its rows
        row.session = LockstepSession(RowBatch([held]), self.runner.max_length, after=after)
        row.undecided, row.prefilled = None, held.length

    def _check_weights(self) -> None:
        self.runner.check_weights()
        bound = self.runner.bound
        if bound is not None and self._version != (version := bound.version):
            self.kept.clear()
            self._version = version

    def keep(self, row: Row) -> None:
        """Keep what a row holds for rows with the same beginning."""
        if isinstance(row.session, LockstepSession) and row.undecided is None:
            (held,) = row.session.rows.rows
            tokens = [*row.request.prompt, *row.request.tokens][: held.length]
            self.kept.keep(held.program, tokens, table=held.table)

    def _row(
        self, request: Request, held: ExitStack, *, opened: AbstractContextManager[Session]
    ) -> Row:
        with held:
            session = held.enter_context(opened)
            return Row(request, session, _held=held.pop_all())

    def prefill(self, parts: Sequence[tuple[Row, int]]) -> Iterator[Outcome]:
        """Run the next tokens of some prompts, so many of each; logits of those that end."""
        own = []
        for row, count in parts:
            own.append(torch.tensor(row.request.prompt[row.prefilled :][:count]))
        rows = [row for row, _ in parts]
        if rows[0].undecided is not None:
            yield from self._prefill_undecided(rows, own)
        elif self.runner.together:
            yield self._attempt(rows, own, run=self._prefill_together)
        else:
            for (row, _), tokens in zip(parts, own, strict=True):
                yield self._attempt([row], [tokens], run=self._prefill_alone)

    def decode(self, rows: Sequence[Row]) -> Iterator[Outcome]:
        """Run the last token of each row."""
        # in an order that stays while rows come and go, so that plans are found again
        rows = sorted(rows, key=lambda row: (row.session.programs[0].path, row.request.number))
        if self.runner.together and not self.runner.deterministic:
            groups = [rows] if rows else []
        else:
            groups = [[row] for row in rows]
        for group in groups:
            last = [torch.tensor(row.request.tokens[-1:]) for row in group]
            yield self._attempt(group, last, run=self._decode)

    def _attempt(
        self,
        rows: Sequence[Row],
        tokens: list[Tensor],
        *,
        run: Callable[[Sequence[Row], list[Tensor]], Tensor | None],
    ) -> Outcome:
        try:
            return rows, run(rows, tokens)
        except Exception as error:  # whatever it is, the other rows go on
            log.exception("a pass over %d rows failed", len(rows))
            return rows, error

    def _prefill_together(self, rows: Sequence[Row], own: list[Tensor]) -> Tensor | None:
        counts = [len(tokens) for tokens in own]
        most, after = padded_count(max(counts), self.runner.device), None
        ids = padded_tokens(own, own, tokens=most)
        if rows[0].steps_done is not None:
            chunks = [_after(row).chunk(row.prefilled, most) for row in rows]
            after = chunks[0][0], torch.cat([hidden for _, hidden in chunks])
        lockstep, batch = self.runner.lockstep, self._batch(rows)
        ends = any(row.tokens_left == count for row, count in zip(rows, counts, strict=True))
        logits = None
        if ends:
            logits = lockstep.run(batch, ids, counts=counts, after=after)[:, 0]
        else:
            lockstep.write_kv(batch, ids, counts=counts, after=after)
        for row, count in zip(rows, counts, strict=True):
            row.prefilled += count
            self.keep(row)  # before it leaves a window
            if row.is_prefilled and isinstance(row.session, LockstepSession):
                row.session.after = None
        return logits

    def _prefill_undecided(self, rows: Sequence[Row], own: list[Tensor]) -> Iterator[Outcome]:
        """Run the shared steps on parts of prompts; the programs of those that end are chosen."""
        yield (ran := self._attempt(rows, own, run=self._shared_steps))
        if not isinstance(ran[1], Exception):
            for row in [row for row in rows if row.tokens_left == 0]:
                yield self._attempt([row], [], run=self._decided)

    def _shared_steps(self, rows: Sequence[Row], own: list[Tensor]) -> None:
        counts = [len(tokens) for tokens in own]
        most, batch = padded_count(max(counts), self.runner.device), self._batch(rows)
        ids = padded_tokens(own, own, tokens=most)
        waiting = [row.undecided for row in rows if row.undecided is not None]
        steps = waiting[0].by.num_steps
        hidden = self.runner.lockstep.run(batch, ids, counts=counts, wants="hidden", stop=steps)
        for row, undecided, count, states in zip(rows, waiting, counts, hidden, strict=True):
            undecided.states.append(states[:count].clone())
            row.prefilled += count

    def _decided(self, rows: Sequence[Row], own: list[Tensor]) -> None:
        (row,) = rows
        assert row.undecided is not None
        self._decide(row, row.undecided)

    def _prefill_alone(self, rows: Sequence[Row], own: list[Tensor]) -> Tensor:
        (row,), (tokens,) = rows, own
        (logits,) = self.runner.prefill(row.session, [tokens])
        row.prefilled += len(tokens)
        return logits[None]

    def _decode(self, rows: Sequence[Row], own: list[Tensor]) -> Tensor:
        if self.runner.together:
            batch, ids = self._batch(rows), torch.stack(own)
            return self.runner.lockstep.run(batch, ids, counts=[1] * len(rows))[:, 0]
        (row,), (token,) = rows, own
        return self.runner.decode(row.session, token)

    def _batch(self, rows: Sequence[Row]) -> RowBatch:
        """The rows as a batch; that of the last pass, if they are the same."""
        held = [row.session.rows for row in rows if isinstance(row.session, LockstepSession)]
        own = tuple(one for batch in held for one in batch.rows)
        if self._batched is None or self._batched.rows != own:
            self._batched = RowBatch(own)
        return self._batched


def _after(row: Row) -> After:
    """Where the prompt of a row goes on whose first steps have run."""
    assert isinstance(row.session, LockstepSession) and row.session.after is not None
    return row.session.after

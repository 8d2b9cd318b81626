"""What one row holds while it runs: blocks of keys and values for each step of its program.

Shape legend: S steps, W blocks of a row at one step.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..capture import KvSpec
from ..errors import ProgramError
from ..passes.address_kv import BLOCK
from ..program import Program
from .kv_store import EMPTY, KvStore
from .kv_windows import KvWindows, first_seen

_FIRST_BLOCKS = 16  # of a new table; it doubles
# Tables outlive the mode they are made or changed in.
_OUTSIDE = torch.inference_mode(False)


class KvRow:
    """The keys and values of one row of `program`, `length` tokens of them.

    `specs` are the slot geometries of the model's layers. `table` i64[S, >= num_blocks] names the
    blocks of each step; `version` changes whenever that does. Blocks that have left the window of
    their layer are given back as tokens come. `close` gives everything back.
    """

    @_OUTSIDE
    def __init__(
        self, store: KvStore, specs: Sequence[KvSpec], *, program: Program, windows: KvWindows
    ) -> None:
        self.store, self.specs, self.program, self.windows = store, specs, program, windows
        self.length, self.num_blocks, self.version = 0, 0, 0
        self._looked = 0  # blocks of tokens that were there when windows were looked at
        self.table = torch.full((program.num_steps, _FIRST_BLOCKS), EMPTY)

    @property
    def num_held(self) -> int:
        """Blocks that it holds, of all steps."""
        return int((self.table != EMPTY).sum())

    def make_room(self, count: int) -> None:
        """Take the blocks that `count` more tokens need, and give back those that are in no window
        any more.
        """
        if self._looked != self.length // BLOCK:
            self._looked = self.length // BLOCK
            self._leave()
        needed = _blocks(self.length + count)
        if needed > self.num_blocks:
            self._take(0, self.num_blocks, stop=needed)
            self.num_blocks = needed

    @_OUTSIDE
    def _leave(self) -> None:
        """Give back what no later token sees, but for one block: a few tokens may be taken back."""
        for window, steps in self.windows.steps(self.program).items():
            seen = first_seen(self.length, window) - 1
            left = [step for step in steps if seen > 0 and self.table[step, seen - 1] != EMPTY]
            if left:
                for spec, own in self._by_spec(left).items():
                    self.store.give(spec, held_in(self.table[own, :seen]))
                self.table[left, :seen] = EMPTY
                self.version += 1

    def can_crop(self, length: int) -> bool:
        """Whether all is there that a token after the first `length` would see."""
        for window, steps in self.windows.steps(self.program).items():
            seen = self.table[steps, first_seen(length, window) : _blocks(length)]
            if (seen == EMPTY).any():
                return False
        return True

    def spare(self) -> Tensor:
        """A block a step i64[S] for what the padding of one pass writes: a NaN in it must not reach
        another row. `give_spare` returns them.
        """
        found = torch.full((self.program.num_steps,), EMPTY)
        for spec, steps in self._steps_of().items():
            found[steps] = torch.tensor(self.store.take(spec, len(steps)))
        return found

    def give_spare(self, spare: Tensor) -> None:
        """Give back the blocks of `spare`."""
        self._give(spare[:, None])

    @_OUTSIDE
    def switch(self, program: Program, kept: int) -> None:
        """Go on as a row of another program whose first `kept` steps are the same.

        Raises ProgramError if they are not.
        """
        if self.program.path[:kept] != program.path[:kept]:
            raise ProgramError(
                f"programs {self.program} and {program} do not share their first {kept} steps"
            )
        self._give(self.table[kept:])
        table = torch.full((program.num_steps, self.table.shape[1]), EMPTY)
        table[:kept] = self.table[:kept]
        self.program, self.table = program, table
        self._take(kept, 0, stop=self.num_blocks)

    @_OUTSIDE
    def adopt(self, blocks: Tensor, first: int = 0) -> None:
        """Hold blocks i64[S, n] that other rows have filled, for the steps from `first` on, instead
        of its own first n: all of their tokens, and no more, are then there.
        """
        count = blocks.shape[1]
        self._widen(count)
        for spec, steps in self._steps_of(first).items():
            self.store.share(spec, held_in(blocks[steps]))
        self._give(self.table[first:, :count])
        self.table[first:, :count] = blocks[first:]
        self.num_blocks = max(self.num_blocks, count)
        self.length = count * BLOCK
        self.version += 1

    @_OUTSIDE
    def crop(self, length: int) -> None:
        """Forget the tokens after the first `length`, which must be in sight (`can_crop`)."""
        needed = _blocks(length)
        self._give(self.table[:, needed:])
        self.table[:, needed:] = EMPTY
        self.length, self.num_blocks = length, needed
        if column := length % BLOCK:
            self._own(needed - 1)
            for spec, steps in self._steps_of().items():
                # what is masked is multiplied by zero, and 0 * NaN is NaN
                self.store.clear(spec, self.table[steps, needed - 1].tolist(), column=column)
        self.version += 1

    @_OUTSIDE
    def branch(self) -> "KvRow":
        """A second row that holds the same and goes on by itself.

        Whole blocks are shared; the last one, which is still written to, is copied.
        """
        other = KvRow(self.store, self.specs, program=self.program, windows=self.windows)
        other.table, other.length = self.table.clone(), self.length
        other.num_blocks = _blocks(self.length)
        other.table[:, other.num_blocks :] = EMPTY
        for spec, steps in self._steps_of().items():
            self.store.share(spec, held_in(other.table[steps]))
        if self.length % BLOCK:
            other._own(other.num_blocks - 1)
        return other

    def _own(self, index: int) -> None:
        """Copy a block of each step that other rows hold as well: it will be written to."""
        for spec, steps in self._steps_of().items():
            shared = [s for s in steps if self.store.is_shared(spec, int(self.table[s, index]))]
            if shared:
                before = self.table[shared, index].tolist()
                own = self.store.take(spec, len(shared))
                self.store.copy(spec, before, target=own)
                self.table[shared, index] = torch.tensor(own)
                self.store.give(spec, before)

    @_OUTSIDE
    def become(self, other: "KvRow") -> None:
        """Hold what another row holds, which then holds nothing."""
        self.close()
        self.program, self.table = other.program, other.table
        self.length, self.num_blocks = other.length, other.num_blocks
        self.version += 1
        other._forget()

    @_OUTSIDE
    def close(self) -> None:
        """Give every block back."""
        self._give(self.table)
        self._forget()

    def _forget(self) -> None:
        self.table = torch.full((self.program.num_steps, _FIRST_BLOCKS), EMPTY)
        self.length = self.num_blocks = 0
        self.version += 1

    def _steps_of(self, first: int = 0) -> dict[KvSpec, list[int]]:
        """The steps from `first` on, by the geometry of their slots."""
        return self._by_spec(range(first, self.program.num_steps))

    def _by_spec(self, steps: Iterable[int]) -> dict[KvSpec, list[int]]:
        found: dict[KvSpec, list[int]] = defaultdict(list)
        for step in steps:
            spec = self.specs[self.program.path[step]]
            if spec.num_kv:  # steps that only read the blocks of others have none
                found[spec].append(step)
        return found

    @_OUTSIDE
    def _take(self, step: int, first: int, *, stop: int) -> None:
        """Take blocks `first` to `stop - 1` of the steps from `step` on."""
        self._widen(stop)
        for spec, own in self._steps_of(step).items():
            taken = self.store.take(spec, len(own) * (stop - first))
            self.table[own, first:stop] = torch.tensor(taken).view(len(own), -1)
        self.version += 1

    def _widen(self, blocks: int) -> None:
        """Let the table name so many blocks a step."""
        while blocks > self.table.shape[1]:
            self.table = torch.cat((self.table, torch.full_like(self.table, EMPTY)), 1)

    def _give(self, table: Tensor) -> None:
        """Give back what the last rows or columns of the table hold."""
        first = self.program.num_steps - len(table)
        for spec, steps in self._steps_of(first).items():
            if blocks := held_in(table[[step - first for step in steps]]):
                self.store.give(spec, blocks)


def _blocks(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK)


def held_in(table: Tensor) -> list[int]:
    """The blocks that a table names."""
    return [block for block in table.flatten().tolist() if block != EMPTY]

"""A conversation: one row whose keys and values stay between calls.

Shape legend: T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..program import Program
from .generator import Generator
from .kv_rows import KvRow
from .lockstep_rows import RowBatch
from .lockstep_session import LockstepSession
from .token_rows import one_row
from .uncopied import Uncopied


class Conversation(Uncopied):
    """Tokens that were said so far, and what a program computed for them. A context manager: at its
    end all is given back.

    Nothing runs twice: a further turn costs its own tokens. `crop` takes tokens back, and `branch`
    goes on in two ways. Raises InputError where rows do not run in lock-step (`Runner.together`).
    """

    remedy = "branch() goes on from the same tokens"

    def __init__(self, generator: Generator, program: Program) -> None:
        runner = generator.runner
        if not runner.together:
            raise InputError(runner.why_apart)
        runner.check_weights()
        self.generator, self.runner, self.program = generator, runner, program
        self.tokens: list[int] = []
        self._row: KvRow = runner.lockstep.row(program)

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back; the conversation is then empty."""
        self.tokens.clear()
        self._row.close()

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Say further tokens i64[T]: logits [V] of what follows them.

        Raises InputError and, before anything runs, KvOverflowError.
        """
        new = one_row(tokens, self.runner.info.vocab_size)
        pending = torch.tensor(self.tokens[self._row.length :] + new)
        with self._unless_it_fails():
            (logits,) = self.runner.prefill(self._session(), [pending])
        self.tokens += new
        return logits

    def generate(self, tokens: Sequence[int] | Tensor = (), **kwargs: Any) -> Tensor:
        """Say further tokens i64[T] and let the model go on: its new tokens i64[N].

        Takes the arguments of `CompiledModel.generate` for one row. Raises what that raises, before
        anything runs.
        """
        new = one_row(tokens, self.runner.info.vocab_size) if len(tokens) else []
        if not self.tokens and not new:
            raise InputError("there is nothing to go on from; pass tokens")
        said = [*self.tokens, *new]
        if kwargs.get("attention_mask") is not None:
            raise InputError("a conversation holds no padding; leave out attention_mask")
        ids = torch.tensor([said])
        call = self.generator.check(ids, attention_mask=torch.ones_like(ids), **kwargs)
        guided = call.settings.guidance_scale not in (None, 1)
        if call.copies > 1 or guided or call.settings.return_dict_in_generate:
            raise InputError(
                "a conversation goes on with one row of tokens; leave out num_beams, "
                "num_return_sequences, guidance_scale and return_dict_in_generate"
            )
        if self._row.length == len(said):  # the last token runs again, for its logits
            self._crop(len(said) - 1)
        with self._unless_it_fails():
            output = self.generator.go_on(call, self._session())[0, len(said) :].cpu()
        self.tokens = [*said, *output.tolist()]
        if self._row.length >= len(self.tokens):  # the loop went on beyond the end
            self._crop(len(self.tokens) - 1)
        return output

    def crop(self, length: int) -> None:
        """Take back all tokens after the first `length`. Raises InputError."""
        if not 0 <= length <= len(self.tokens):
            raise InputError(
                f"length {length} is not one of 0..{len(self.tokens)}, the tokens that were said"
            )
        del self.tokens[length:]
        if self._row.length > length:
            self._crop(length)

    def _crop(self, length: int) -> None:
        """Let the row hold so many tokens; none, to run again, if windows have left them."""
        self._row.crop(length if self._row.can_crop(length) else 0)

    def branch(self) -> "Conversation":
        """A second conversation with the same beginning; what both hold is held once."""
        other = Conversation(self.generator, self.program)
        other.tokens, other._row = list(self.tokens), self._row.branch()
        return other

    @contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        """An error, or an interruption, leaves what was said before."""
        try:
            yield
        except BaseException:
            if self._row.length > len(self.tokens):
                self._crop(len(self.tokens))
            raise

    def _session(self) -> LockstepSession:
        self.runner.check_weights()
        return LockstepSession(RowBatch([self._row]), self.runner.max_length)

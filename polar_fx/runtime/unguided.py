"""The unguided rows of `guidance_scale`: beside each prompt, another one that is continued with the
same tokens.

transformers' logits processor asks the model for their logits and mixes them with the prompt's own;
here they have a session beside that of the prompts, and run the same programs.

Shape legend: B batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, KvOverflowError
from ..program import Program
from .runner import Runner

NEGATIVE, NEGATIVE_MASK = "negative_prompt_ids", "negative_prompt_attention_mask"


def check_guidance(runner: Runner, settings: Any, *, kwargs: dict[str, Any], batch: int) -> None:
    """Raise InputError for an unguided prompt that does not fit its call of `batch` rows."""
    scale, ids = settings.guidance_scale, kwargs.get(NEGATIVE)
    if scale is None or scale == 1:
        given = next((n for n in (NEGATIVE, NEGATIVE_MASK) if kwargs.get(n) is not None), None)
        if given is not None:
            raise InputError(f"{given} says what to guide away from; pass guidance_scale with it")
        return
    if (settings.num_beams or 1) > 1:
        raise InputError(
            f"guidance_scale={scale!r} with num_beams={settings.num_beams}: transformers lets "
            "unguided rows follow no beam; guide greedy search or sampling"
        )
    if ids is None:
        if kwargs.get(NEGATIVE_MASK) is not None:
            raise InputError(f"{NEGATIVE_MASK} is of no use without {NEGATIVE}; pass both")
        return
    rows, _ = runner.rows(ids, kwargs.get(NEGATIVE_MASK))
    if len(rows) != batch:
        raise InputError(
            f"{NEGATIVE} has {len(rows)} rows beside {batch} prompts; give one for each prompt"
        )


def default_unguided(
    settings: Any, kwargs: dict[str, Any], *, rows: Sequence[Tensor]
) -> dict[str, Any]:
    """The unguided prompts of a guided call that names none: the last token of each row, on
    whichever side that is padded.
    """
    scale = settings.guidance_scale
    if scale is None or scale == 1 or kwargs.get(NEGATIVE) is not None:
        return {}
    return {NEGATIVE: torch.stack([row[-1:] for row in rows])}


def check_room(runner: Runner, kwargs: dict[str, Any], *, new: int) -> None:
    """Raise KvOverflowError if an unguided prompt and its `new` tokens do not fit the KV pool."""
    if (ids := kwargs.get(NEGATIVE)) is None:
        return
    longest = max(len(r) for r in runner.rows(ids, kwargs.get(NEGATIVE_MASK))[0])
    if longest + new - 1 > runner.max_length:
        raise KvOverflowError(
            f"{NEGATIVE} of {longest} tokens and max_new_tokens={new} exceed the KV pool of "
            f"{runner.max_length}; shorten it, lower max_new_tokens, or compile with "
            f"max_length={longest + new}"
        )


def of_rows(kwargs: dict[str, Any], where: Tensor) -> dict[str, Any]:
    """The arguments with the unguided prompts of these rows i64[N], repeated ones included."""
    chosen = {}
    for name in (NEGATIVE, NEGATIVE_MASK):
        if (value := kwargs.get(name)) is not None:
            chosen[name] = value[where.to(value.device)]
    return {**kwargs, **chosen}


class Unguided:
    """Their session, opened when they are first asked for; a context manager that closes it."""

    def __init__(self, runner: Runner, programs: Sequence[Program]) -> None:
        self.runner, self.programs, self.session = runner, programs, None
        self._stack = ExitStack()

    def __enter__(self) -> "Unguided":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [B, 1, V] after the prompts i64[B, T], and then after a token i64[B, 1] a row."""
        if self.session is not None:
            return self.runner.decode(self.session, input_ids[:, -1])[:, None]
        self.session = self._stack.enter_context(self.runner.open_rows(self.programs))
        rows, _ = self.runner.rows(input_ids, attention_mask)
        return torch.stack(self.runner.prefill(self.session, rows))[:, None]

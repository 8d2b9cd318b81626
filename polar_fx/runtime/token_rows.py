"""What a caller hands in as tokens, checked and taken apart into rows.

Shape legend: B batch, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..errors import InputError

_GPU_TOKENS = 64


def token_rows(
    input_ids: Tensor, attention_mask: Tensor | None, *, vocab_size: int
) -> tuple[list[Tensor], Tensor]:
    """The real tokens of each row, and the boolean mask [B, T] that says where they stood, on the
    CPU.

    Raises InputError.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        what = (
            f"a tensor of shape {tuple(input_ids.shape)}"
            if isinstance(input_ids, Tensor)
            else type(input_ids).__name__
        )
        raise InputError(f"input_ids must be an integer tensor [batch, tokens], got {what}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"input_ids must be integers, got {input_ids.dtype}; pass the tokenizer's input_ids"
        )
    if input_ids.numel() == 0:
        raise InputError(
            f"input_ids is empty (shape {tuple(input_ids.shape)}); a prompt needs at least one "
            "token"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        got = (
            tuple(attention_mask.shape)
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise InputError(
            f"attention_mask must be a tensor of the shape of input_ids {tuple(input_ids.shape)}, "
            f"got {got}"
        )
    # once: looking at each row would wait for the device
    input_ids, given = input_ids.cpu(), attention_mask.cpu()
    mask = given.bool()
    if bool((other := given != mask).any()):
        raise InputError(
            f"attention_mask holds {given[other][0].item()}; it is 1 at real tokens and 0 at "
            "padding"
        )
    rows = [ids[m].long() for ids, m in zip(input_ids, mask, strict=True)]
    for i, row in enumerate(rows):
        if row.numel() == 0:
            raise InputError(f"row {i} has no token: its attention_mask is all zero")
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise InputError(
                f"row {i} holds token id {bad}, outside the vocabulary 0..{vocab_size - 1}"
            )
    return rows, mask


def one_row(tokens: Any, vocab_size: int) -> list[int]:
    """The token ids of a row that was given as numbers or i64[T]. Raises InputError."""
    try:
        given = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"tokens must be whole numbers, got {tokens!r}") from error
    if given.numel() == 0:
        given = given.long()
    (row,), _ = token_rows(given[None], None, vocab_size=vocab_size)
    return row.tolist()


def padded(tensors: Sequence[Tensor], tokens: int = 0) -> Tensor:
    """Rows [T, ...] as one tensor [B, T, ...] of at least `tokens` tokens, zeros after what is
    shorter.
    """
    together = pad_sequence(list(tensors), batch_first=True)
    if together.shape[1] >= tokens:
        return together
    return pad(together, (0, 0) * (together.dim() - 2) + (0, tokens - together.shape[1]))


def padded_tokens(parts: Sequence[Tensor], rows: Sequence[Tensor], *, tokens: int) -> Tensor:
    """Parts of rows as ids i64[B, T], filled up to `tokens` with the last token of their row: what
    padding computes can then be no worse than the row itself, such as NaN.
    """
    ids = torch.stack([row[-1:].expand(tokens) for row in rows]).clone()
    for own, part in zip(ids, parts, strict=True):
        own[: len(part)] = part
    return ids


def padded_count(tokens: int, device: torch.device) -> int:
    """How many tokens a row a pass over so many is made for: on a GPU, of several tokens, a
    multiple of 64, since its attention library makes a plan for each new size.
    """
    return tokens + -tokens % _GPU_TOKENS if device.type == "cuda" and tokens > 1 else tokens

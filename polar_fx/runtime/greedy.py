"""Plain greedy continuation, with the device never waiting for the host.

transformers' loop asks after each token whether all rows have ended, and waits for the device's
answer before it launches the next one. On a GPU that costs more than the token of a small model. A
call that asks for the likeliest tokens, maybe for a smallest number of them, and for nothing that
looks at them meanwhile runs here; all others are transformers' own.

Shape legend: B rows, N new tokens, V vocabulary.
"""

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
)

from .generation_settings import setting_names

# On a GPU, so many tokens are launched before the host looks whether all rows had ended: enough
# that the device has always something to do, few enough that little is computed in vain.
AHEAD = 4

_PLAIN = (MaxLengthCriteria, EosTokenCriteria)


@dataclass(frozen=True)
class Greedy:
    """A plain call: at most `new` tokens, which of them end a row, what fills it after that, and
    how many tokens a row has at least.
    """

    new: int
    ends: tuple[int, ...]
    pad: int
    least: int = 0


def plain(running: Any, settings: GenerationConfig, *, kwargs: dict[str, Any]) -> Greedy | None:
    """What is to be generated, if the settings and arguments of a call ask for so many greedy
    tokens, at least and at most, and for nothing else; None for all other calls.

    `running` is a transformers GenerationMixin: it says itself which processors and stopping
    criteria it would use.
    """
    known = setting_names() | {"generation_config"}
    if any(value is not None and name not in known for name, value in kwargs.items()):
        return None
    given = kwargs.get("generation_config")
    lengths = (kwargs.get("max_length"), given and given.max_length)
    own = running.generation_config.min_length
    shortest = (kwargs.get("min_length"), given and given.min_length, own)
    least = settings.min_new_tokens or 0
    if not settings.max_new_tokens or any(length is not None for length in lengths):
        return None  # transformers warns of lengths that are its own or do not agree
    if least > settings.max_new_tokens or (least and any(n is not None for n in shortest)):
        return None  # and of these
    if settings.get_generation_mode().value != "greedy_search" or settings.return_dict_in_generate:
        return None
    if settings.stop_strings is not None or (settings.num_return_sequences or 1) > 1:
        return None
    prepared = copy.deepcopy(settings)
    running._prepare_special_tokens(prepared, True, device="cpu")
    criteria = running._get_stopping_criteria(prepared, StoppingCriteriaList())
    processors = running._get_logits_processor(
        prepared,
        1,
        torch.zeros(1, 1, dtype=torch.long),
        device="cpu",
        model_kwargs={"attention_mask": None},
        logits_processor=LogitsProcessorList(),
    )
    if not all(isinstance(criterion, _PLAIN) for criterion in criteria):
        return None
    if not all(type(processor) is MinNewTokensLengthLogitsProcessor for processor in processors):
        return None
    ends, pad = prepared._eos_token_tensor, prepared._pad_token_tensor
    return Greedy(
        settings.max_new_tokens,
        () if ends is None else tuple(ends.flatten().tolist()),
        0 if pad is None else int(pad),
        least,
    )


def continued(
    logits: Tensor,
    decode: Callable[[Tensor], Tensor],
    *,
    asked: Greedy,
    watch: "Watch | None" = None,
) -> Tensor:
    """The likeliest tokens i64[B, N] after logits [B, V], N <= `asked.new`; `decode` gives the
    logits that follow tokens i64[B], and may be asked for some more.

    `watch` tells when all rows have ended (default: what suits the device).
    """
    # no other one can be chosen; told here, a GPU is not waited for
    ends = [end for end in asked.ends if 0 <= end < logits.shape[-1]]
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    stops = torch.tensor(ends, dtype=torch.long, device=logits.device)
    if watch is None:
        watch = _Later(logits.device) if logits.device.type == "cuda" else _AtOnce()
    tokens: list[Tensor] = []
    while True:
        if ends and len(tokens) < asked.least:
            # not in place: the logits may lie where a graph writes them
            logits = logits.index_fill(-1, stops, -torch.inf)
        token = logits.max(-1).indices  # on the CPU, argmax of bfloat16 takes thrice the time
        if ends:
            token = token.masked_fill(ended, asked.pad)
            ended = ended | torch.isin(token, stops)
        tokens.append(token)
        if len(tokens) == asked.new or (ends and watch.all_ended(ended)):
            break
        logits = decode(token)
    found = torch.stack(tokens, 1)
    return found[:, : _needed(found, stops)] if ends else found


def _needed(tokens: Tensor, stops: Tensor) -> int:
    """How many of the tokens [B, N] there are until all rows have ended."""
    is_end = torch.isin(tokens, stops)
    first = is_end.int().argmax(1) + 1
    return int(torch.where(is_end.any(1), first, tokens.shape[1]).max())


class Watch(Protocol):
    """Tells whether all rows have ended."""

    def all_ended(self, ended: Tensor) -> bool:
        """Whether it is known of these bool[B], or of some that were asked about before."""
        ...


class _AtOnce:
    def all_ended(self, ended: Tensor) -> bool:
        return bool(ended.all())


class _Later:
    """Answers for the tokens `AHEAD` before: their flag has come to the host meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._flags: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._device = device

    def all_ended(self, ended: Tensor) -> bool:
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(ended.all(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._flags.append((flag, copied))
        if len(self._flags) <= AHEAD:
            return False
        flag, copied = self._flags.popleft()
        copied.synchronize()
        return bool(flag)

"""What a `generate_until` request asks for, in terms of transformers' `generate`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


@dataclass(frozen=True)
class Asked:
    """Stop strings, the most new tokens, and what else goes to `generate`."""

    until: tuple[str, ...]
    max_new_tokens: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], max_new_tokens: int) -> "Asked":
        """From a request's arguments; `max_new_tokens` where they name none.

        As in the harness, a temperature above 0 samples unless `do_sample` says otherwise, and
        greedy decoding has none.
        """
        options = dict(arguments)
        until = options.pop("until", None) or ()
        lengths = [options.pop(name, None) for name in _LENGTHS]
        named = [length for length in lengths if length is not None]
        if options.get("do_sample") is None:
            options["do_sample"] = (options.get("temperature") or 0) > 0
        if not options["do_sample"]:
            for name in _SAMPLING:
                options.pop(name, None)
        strings = (until,) if isinstance(until, str) else tuple(until)
        return cls(
            tuple(s for s in strings if s), int(named[0]) if named else max_new_tokens, options
        )

    @property
    def key(self) -> str:
        """Equal for requests that one call can answer."""
        return repr((self.until, self.max_new_tokens, sorted(self.options.items())))


class StopStrings(StoppingCriteria):
    """Ends rows whose new text holds one of the strings.

    transformers' own stop strings may begin in the prompt: one that ends in a line break and an
    answer that begins with one would make "\\n\\n".
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], *, prompt_tokens: int) -> None:
        self.tokenizer, self.strings, self.start = tokenizer, strings, prompt_tokens
        # no token of a text is shorter than a byte
        self.reach = 1 + max(len(s.encode()) for s in strings)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        tails = self.tokenizer.batch_decode(
            input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :]
        )
        return torch.tensor(list(map(self._has_ended, tails)), device=input_ids.device)

    def _has_ended(self, text: str) -> bool:
        return any(string in text for string in self.strings)


def new_text(
    tokenizer: Any, tokens: Iterable[int], *, ends: Iterable[int], until: Iterable[str]
) -> str:
    """The text of new tokens up to the first that is one of `ends`, and of that up to the first of
    the stop strings.
    """
    kept, stops = list(tokens), set(ends)
    first = next((i for i, t in enumerate(kept) if t in stops), len(kept))
    text = tokenizer.decode(kept[:first], skip_special_tokens=True)
    for string in until:
        text = text.partition(string)[0]
    return text

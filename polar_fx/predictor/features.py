"""What a predictor sees of an input: the model's own hidden states after the first steps, which
every program shares.

Nothing is computed twice for them, and no second model is needed. DR.LLM measured 38.6 % with
hidden states against 30.0 % with input embeddings (arXiv 2510.12773, table 6). Shape legend: T
tokens, S streams, d hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Features:
    """Which hidden states are looked at: those of the last `window` prompt tokens after `num_steps`
    steps.

    With `num_steps` 0 they are the token embeddings. Of a longer prompt only its end is seen, where
    the question stands. Raises InputError on a value out of range.
    """

    num_steps: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 0), ("window", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(
                    f"{name} of features is {value!r}; give a whole number of at least {least}"
                )

    def tokens(self, hidden: Tensor) -> Tensor:
        """Of hidden states [T, d], those looked at, at most `window`; of several streams [T, S, d],
        [T, S d].
        """
        return hidden[-self.window :].flatten(1)

    def pooled(self, hidden: Tensor) -> Tensor:
        """Those of the last token, and the mean of all looked at, f32[2 d]."""
        seen = self.tokens(hidden)
        return torch.cat([seen[-1], seen.mean(0)]).float()

"""How the next token of one row is chosen, with transformers' processors of scores.

Shape legend: V vocabulary, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import InputError

# Takes the tokens so far i64[1, T] and scores f32[1, V], and returns scores.
ScoresProcessor = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How one request is continued; rows of one batch may differ in all of it.

    Args:
        max_new_tokens: tokens at most.
        temperature: 0 takes the likeliest token.
        top_k, top_p, min_p: which tokens may be drawn, as transformers defines them; 0, 1 and 0
            allow all.
        repetition_penalty: as transformers defines it; 1 is none.
        presence_penalty, frequency_penalty: taken from the score of a token that was generated
            before, once and at each time (as OpenAI's API defines them).
        stop_tokens: tokens that end the text.
        stop: texts that end it, and are left out of it; they need the engine's tokenizer.
        seed: the same draws whatever runs beside; None draws another seed each time.
        processors: more that change scores, after the penalties.

    Raises InputError.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    processors: tuple[ScoresProcessor, ...] = ()

    def __post_init__(self) -> None:
        _check_kinds(self)
        limits = {
            "max_new_tokens": (1, math.inf),
            "temperature": (0, math.inf),
            "top_k": (0, math.inf),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (0, math.inf),
            "presence_penalty": (-math.inf, math.inf),
            "frequency_penalty": (-math.inf, math.inf),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InputError(f"{name} must be a number from {low} to {high}, got {value!r}")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise InputError(f"{name} must be more than 0")
        if "" in self.stop:
            raise InputError("a stop text is empty; leave it out")


def _check_kinds(how: Sampling) -> None:
    """Raise InputError for values of another kind than a setting takes."""
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "max_new_tokens": (_is_whole, "a whole number"),
        "top_k": (_is_whole, "a whole number"),
        "seed": (lambda value: value is None or _is_whole(value), "a whole number or None"),
        "stop_tokens": (lambda value: _are(value, _is_whole), "a tuple of token ids"),
        "stop": (lambda value: _are(value, lambda v: isinstance(v, str)), "a tuple of texts"),
        "processors": (lambda value: _are(value, callable), "a tuple of functions"),
    }
    for name in (f.name for f in fields(how) if f.name not in kinds):
        kinds[name] = (lambda v: isinstance(v, (int, float)), "a number")
    for name, (is_right, what) in kinds.items():
        value = getattr(how, name)
        if isinstance(value, bool) or not is_right(value):
            raise InputError(f"{name} must be {what}, got {value!r}")


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _are(values: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(values, (tuple, list)) and all(map(is_right, values))


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling, self._num_prompt = sampling, len(prompt)
        # what processors are shown, as far as it was written
        self._tokens = torch.empty(len(prompt) + sampling.max_new_tokens, dtype=torch.long)
        self._tokens[: len(prompt)] = torch.tensor(prompt)
        self._written = len(prompt)
        self._processors = self._penalties()
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            seed = self._generator.seed() if sampling.seed is None else sampling.seed
            self._generator.manual_seed(seed)
            self._processors += _warpers(sampling)

    @property
    def is_argmax(self) -> bool:
        """Whether the likeliest token is taken, and scores stay as they are."""
        return not self._processors and self._generator is None

    def choose(self, logits: Tensor, before: Sequence[int]) -> int:
        """The next token, of logits [V]; `before` are the new ones so far.

        Raises InputError for scores of which none is finite.
        """
        scores = logits.to("cpu", torch.float32)[None]
        if self._processors:
            scores = self._processors(self._so_far(before), scores)
        if not bool(scores.isfinite().any()) or bool(scores.isnan().any()):
            raise InputError("the scores of the next token are not finite; use another program")
        if self._generator is None:
            return int(scores.argmax())
        chances = scores.softmax(-1)
        return int(torch.multinomial(chances[0], 1, generator=self._generator))

    def _so_far(self, before: Sequence[int]) -> Any:
        """The prompt and the new tokens i64[1, T]."""
        count = self._num_prompt + len(before)
        new = before[self._written - self._num_prompt :]
        self._tokens[self._written : count] = torch.tensor(new, dtype=torch.long)
        self._written = count
        return self._tokens[None, :count]

    def _penalties(self) -> LogitsProcessorList:
        found = LogitsProcessorList()
        how = self.sampling
        if how.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
        if how.presence_penalty or how.frequency_penalty:
            found.append(self._subtract)  # type: ignore[arg-type]
        found += list(how.processors)
        return found

    def _subtract(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Presence and frequency penalties, over the generated tokens."""
        values, counts = tokens[0, self._num_prompt :].unique(return_counts=True)
        how = self.sampling
        scores = scores.clone()
        scores[0, values] -= how.presence_penalty + how.frequency_penalty * counts
        return scores


def _warpers(how: Sampling) -> list[ScoresProcessor]:
    found: list[ScoresProcessor] = []
    if how.temperature != 1:
        found.append(TemperatureLogitsWarper(float(how.temperature)))
    if how.top_k:
        found.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        found.append(TopPLogitsWarper(float(how.top_p)))
    if how.min_p:
        found.append(MinPLogitsWarper(float(how.min_p)))
    return found

"""A model's own generation settings for one request of an engine."""

from collections.abc import Sequence
from typing import Any

from ..runtime.generator import Generator
from .sampling import Sampling


def sampling_by_defaults(
    generator: Generator,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> Sampling:
    """How transformers' `generate` would continue `prompt` with these arguments: all else, such as
    penalties, forbidden tokens and what ends a text, is the model's generation config.

    Temperature 0 is greedy. The result is of this prompt. Raises InputError.
    """
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    settings, processors = generator.processors(prompt, max_new_tokens, **how)
    ends = settings.eos_token_id
    stops = settings.stop_strings or ()
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=float(temperature > 0),  # the processors divide by it
        stop_tokens=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        stop=(*stop, *((stops,) if isinstance(stops, str) else stops)),
        seed=seed,
        processors=tuple(processors),
    )

"""Which settings of transformers' `generate` can be followed."""

import copy
import functools

from transformers import GenerationConfig

from ..errors import InputError

_LOGITS_ONLY = ("output_hidden_states", "output_attentions")
# settings that ask for a loop of transformers that takes more from a model than its next logits
_OTHER_LOOPS = (
    "constraints",
    "force_words_ids",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "dola_layers",
    "penalty_alpha",
    "num_beam_groups",
)
# caches of transformers that hold the keys and values as they are, as the compiled model's own does
_SAME_NUMBERS = (
    None,
    "dynamic",
    "dynamic_full",
    "static",
    "sliding_window",
    "hybrid",
    "hybrid_chunked",
)
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


@functools.cache
def setting_names() -> frozenset[str]:
    """The arguments of `generate` that are settings."""
    return frozenset(GenerationConfig().to_dict())


def refuse_settings(config: GenerationConfig) -> None:
    """Raise InputError for settings that only the model itself can follow, wherever they were
    given.
    """
    if (kind := getattr(config, "cache_implementation", None)) not in _SAME_NUMBERS:
        raise InputError(
            f"cache_implementation={kind!r} cannot be followed: the compiled model keeps its own "
            "KV cache, allocated once; set cache_implementation of the generation_config (the "
            "model's own, if none was passed) to None"
        )
    for name in _LOGITS_ONLY:
        if config.return_dict_in_generate and getattr(config, name, None):
            raise InputError(
                f"{name}=True: the compiled model hands out logits only; leave it out, or ask the "
                "model itself"
            )
    for name in ("num_beams", "num_return_sequences"):
        if (count := getattr(config, name)) is not None and count < 1:
            raise InputError(f"{name}={count} rows cannot be generated; take at least 1")
    if config.is_assistant:
        raise InputError(
            "is_assistant=True lets another model's loop end this one; leave it out, and assist "
            "the model itself"
        )
    if config.token_healing:
        raise InputError(
            "token_healing=True changes the last tokens of a prompt before it is run; heal the "
            "prompt first, and leave it out"
        )
    mode = config.get_generation_mode().value
    asked = next((n for n in _OTHER_LOOPS if getattr(config, n, None)), None)
    if mode not in _MODES:
        what = f"{asked}={getattr(config, asked)!r}" if asked else "its settings"
        raise InputError(
            f"generate() runs greedy search, sampling and beams; {what} asks for {mode}: leave it "
            "out"
        )


def without_chunks(config: GenerationConfig) -> GenerationConfig:
    """A copy without what transformers would do to the prompt and its cache: `prefill` cuts a
    prompt in chunks of its own (`prefill_chunk_size`), and the session is the cache.
    """
    config = copy.deepcopy(config)
    config.prefill_chunk_size = None
    if config.cache_implementation in _SAME_NUMBERS:
        config.cache_implementation = None
    return config

"""Which of transformers' causal language models can run: each as a tiny one with random weights,
captured and held against itself.

No family is known here: a configuration is made small by the names that transformers gives its
sizes, whatever the model.
"""

import contextlib
import inspect
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from ..capture.checked import capture_checked
from ..errors import PolarError, UnsupportedModelError
from ..library import LayerLibrary
from ..output.plain_text import first_line

_DEPTH = 4
_MOST_ASKED = 3  # errors of one configuration that are followed
_NONE = object()
_MOST_PARAMETERS = 30_000_000
_HEADS, _HEAD, _WIDTH = 4, 8, 32

# By what a size is called, in configurations of any model.
_SIZES: tuple[tuple[int, str], ...] = (
    (
        _DEPTH,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth "
        "num_decoder_layers num_encoder_layers",
    ),
    (
        _WIDTH,
        "hidden_size d_model n_embd embed_dim dim word_embed_proj_dim embedding_size "
        "input_embedding_size hidden_dim",
    ),
    (
        64,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size d_ff "
        "mlp_dim intermediate_size_mlp attention_hidden_size d_ssm lru_width dff",
    ),
    (
        _HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "num_experts n_routed_experts num_local_experts chunk_size num_routed_experts "
        "linear_num_value_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok num_experts_per_token "
        "n_recurrent_layers num_kv_shared_layers moe_topk top_k moe_k linear_num_key_heads "
        "num_attention_groups ngroups n_groups indexer_compress_ratio",
    ),
    (
        _HEAD,
        "head_dim kv_channels v_head_dim qk_nope_head_dim q_lora_rank kv_lora_rank d_state "
        "ssm_state_size state_size linear_key_head_dim linear_value_head_dim sliding_window "
        "window_size index_head_dim hidden_size_per_layer_input global_head_dim dt_rank "
        "time_step_rank d_kv laurel_rank clip_qkv",
    ),
    (
        16,
        "moe_intermediate_size moe_shared_expert_intermediate_size attention_chunk_size "
        "shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size d_head",
    ),
    (12, "qk_head_dim"),
    (4, "qk_rope_head_dim rotary_dim index_topk indexer_budget"),
    # with fewer, tokens often score exactly 0, and which of them are chosen is up to the processor
    (32, "index_n_heads"),
    (
        1,
        "n_input_layers n_output_layers n_group topk_group first_k_dense_replace "
        "num_shared_experts n_shared_experts pretraining_tp num_dense_layers indexer_kv_heads",
    ),
    (100, "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (
        256,
        "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx seq_length "
        "max_source_positions max_target_positions",
    ),
)
_SMALL = {name: size for size, names in _SIZES for name in names.split()}
# Tried one after another, where sizes that fit most models do not fit together; 0: as the
# configuration has it.
_OTHERWISE: tuple[dict[str, int], ...] = (
    {},
    {"num_heads": 8},
    {"num_key_value_heads": _HEADS},
    {"head_dim": 0},
    {"head_dim": 0, "num_key_value_heads": _HEADS},
    {"d_head": _HEAD},
    {"head_dim": 4},
)
_LAYER_KINDS = ["conv", "full_attention"] * (_DEPTH // 2)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """What became of one type of model: "exact", "refused", or "unmade" if no tiny one could be
    made; why, in a sentence; whether its layers keep states.
    """

    kind: str
    state: str
    why: str = ""
    keeps_states: bool = False


def causal_kinds() -> list[str]:
    """The types of the installed transformers that have a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(kind: str) -> Family:
    """Make a tiny model of this type, capture it, and hold the capture against it."""
    with _silent():
        try:
            model = tiny_model(kind)
        except PolarError as error:
            return Family(kind, "refused", first_line(error))
        except Exception as error:  # whatever a configuration of made-up sizes leads to
            return Family(kind, "unmade", " ".join(str(error).split())[:200] or repr(error))
        try:
            library = LayerLibrary(capture_checked(model))
        except PolarError as error:
            return Family(kind, "refused", first_line(error))
        return Family(kind, "exact", keeps_states=library.table.keeps_states)


def tiny_model(kind: str) -> PreTrainedModel:
    """A model of this type with small sizes and random weights, which runs two tokens; equal ones
    in every process.

    Raises whatever transformers raises for such sizes, and UnsupportedModelError if the model
    wants something else than tokens.
    """
    problem: Exception | None = None
    whole = _text_part(kind)
    for derived, fill, sizes in itertools.product((True, False), (False, True), _OTHERWISE):
        asked: list[_Asked] = []
        for _ in range(_MOST_ASKED):
            small = _Small({**_SMALL, **sizes}, fill=fill, derived=derived, asked=asked)
            try:
                return _running(_model(kind, small.of(whole)))
            except PolarError:
                raise
            except Exception as error:
                problem = problem or error
                new = [a for a in _asked_for(error, whole) if a not in asked]
                asked = [*asked, *new]
                if not new:
                    break
    assert problem is not None
    raise problem


def _text_part(kind: str) -> PreTrainedConfig:
    """The usual configuration of this type, or the part of it that the causal model takes."""
    config = CONFIG_MAPPING[kind]()
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    parts = [config, *(p for p in vars(config).values() if isinstance(p, PreTrainedConfig))]
    return next((part for part in parts if type(part) is causal.config_class), config)


def _running(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        try:
            model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
        except ValueError as error:
            taken = {*inspect.signature(model.forward).parameters} - {"input_ids"}
            if taken & {*re.findall(r"\w+", str(error))} and "None" in str(error):
                raise UnsupportedModelError(
                    f"{type(model).__name__} does not run on tokens alone: {first_line(error)}",
                    "use the model that it belongs to",
                ) from error
            raise
    return model


def _model(kind: str, config: PreTrainedConfig) -> PreTrainedModel:
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
    with torch.device("meta"):
        size = sum(p.numel() for p in made._from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"it has {size} parameters with all sizes that are known made small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = made._from_config(config).eval()
        _spread(model)
    return model


@dataclass(frozen=True)
class _Asked:
    """A value that an error asked for: of configurations of a type, or of any that has the name."""

    name: str
    value: Any
    of: type | None = None


def _asked_for(error: Exception, config: PreTrainedConfig) -> list[_Asked]:
    """What an error of a configuration or of the model's code says is missing or has to be."""
    kinds = [*dict.fromkeys(getattr(config, "layer_types", None) or ())]
    if isinstance(error, AttributeError) and isinstance(error.obj, PreTrainedConfig):
        return [_Asked(n, v, type(error.obj)) for n, v in _ROPE.items() if n == error.name]
    if isinstance(error, KeyError) and error.args[0] in kinds:
        return [_Asked("rope_parameters", dict.fromkeys(kinds, _ROPE), type(config))]
    if said := re.search(r"(\w+) must be (\d+)", str(error)):
        return [_Asked(said[1], int(said[2]))]
    return []


@dataclass(frozen=True)
class _Small:
    """How configurations are made small: by the sizes of names, with `fill` also what they leave
    open, with `derived` also what they make of other sizes themselves.
    """

    sizes: Mapping[str, int]
    fill: bool
    derived: bool
    asked: Sequence[_Asked]

    def of(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration with small sizes."""
        return type(config)(**self._arguments(config))

    def _arguments(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Those that differ from the usual ones, those of its parts included."""
        found: dict[str, Any] = {}
        depth = next((getattr(config, n) for n in _SIZES[0][1].split() if hasattr(config, n)), None)
        for name, value in vars(config).items():
            kept = self.derived or getattr(type(config), name, _NONE) == value
            if isinstance(value, PreTrainedConfig):
                found[name] = self._arguments(value)
            elif type(value) is int and kept and (size := _size(name, self.sizes)):
                found[name] = min(value, size)
            elif name == "is_decoder":  # what is an encoder otherwise
                found[name] = True
            elif name in _TOKENS and value is not None:
                found[name] = _TOKENS[name]
            elif isinstance(value, (list, tuple)) and depth and len(value) == depth > _DEPTH:
                found[name] = _some_of_each(value)
            elif self.fill and value is None:
                found |= self._filled(config, name)
        asked = [a for a in self.asked if (a.of or type(config)) is type(config)]
        return found | {a.name: a.value for a in asked if a.of or hasattr(config, a.name)}

    def _filled(self, config: PreTrainedConfig, name: str) -> dict[str, Any]:
        """What a configuration leaves open under this name, if it can be told."""
        if size := _size(name, self.sizes):
            return {name: size}
        if name == "layer_types":
            return {name: _LAYER_KINDS}
        several = getattr(config, f"{name.removeprefix('default_')}s", None)
        if name.startswith("default_") and several:
            return {name: several[0]}
        return {}


def _size(name: str, sizes: Mapping[str, int]) -> int | None:
    """The small size of this name, or of the name without one of its words: models put the name of
    a part before it.
    """
    words = name.split("_")
    shorter = ("_".join(words[:i] + words[i + 1 :]) for i in range(len(words)))
    return next((sizes[n] for n in (name, *shorter) if n in sizes), None)


def _some_of_each(values: Sequence[Any]) -> list[Any]:
    """So many of a list with an entry a layer as are left of its layers, each kind in turn."""
    kinds = [value for i, value in enumerate(values) if value not in values[:i]]
    return [kinds[i % len(kinds)] for i in range(_DEPTH)]


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Weights of trained size: with the usual initial ones attention is flat, and a wrong mask or
    state would hardly show.
    """
    for weight in model.parameters():
        noise = torch.randn(weight.shape).to(weight.dtype)
        if weight.dim() > 1:
            weight.copy_(noise * 1.5 * weight.shape[-1] ** -0.5)
        else:
            weight.add_(0.1 * noise)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What torch and transformers say about models nobody will use helps nobody."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)


def markdown(families: Sequence[Family]) -> str:
    """The families as a table."""
    lines = ["| type | | why |", "|---|---|---|"]
    for family in families:
        note = "keeps states" if family.keeps_states else family.why.replace("|", "/")
        lines.append(f"| {family.kind} | {family.state} | {note} |")
    return "\n".join(lines) + "\n"

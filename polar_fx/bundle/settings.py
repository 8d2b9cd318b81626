"""The model's config and generation defaults as plain JSON, read back without a class of the
model's family.

Generation asks a config for a handful of numbers. A plain `PreTrainedConfig` answers them, so that
a bundle needs neither the family's files nor a transformers release that has them.
"""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ..errors import InputError
from ..runtime.generator import refuse_settings
from .errors import BundleError
from .files import parse_json

# what generation asks for under these names, whatever the family calls them
_ASKED = (
    "vocab_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# generation defaults that a server does not follow, and what they are where they ask for nothing
_SERVED_AS = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_time": None,
    "token_healing": False,
    "guidance_scale": 1,
}
# a folder of the exporting machine; code of the model's own; what is done to weights when they are
# loaded
_LEFT_OUT = ("_name_or_path", "auto_map", "quantization_config")


def config_fields(config: PreTrainedConfig, depth: int) -> dict[str, Any]:
    """The text model's config as JSON values, with what generation asks for under its common
    names; a model has `depth` layers, whatever its config counts as such.
    """
    text = config.get_text_config(decoder=True)
    fields = {k: v for k, v in text.to_dict().items() if k not in _LEFT_OUT}
    fields |= {name: getattr(text, name) for name in _ASKED if hasattr(text, name)}
    names = config.architectures or [type(config).__name__]
    return {**fields, "num_hidden_layers": depth, "architectures": names}


def generation_fields(config: GenerationConfig | None) -> dict[str, Any]:
    """Generation defaults as JSON values, those that are not set left out."""
    return {
        k: v for k, v in (config.to_dict() if config is not None else {}).items() if v is not None
    }


def check_served(config: GenerationConfig | None) -> None:
    """Raise InputError for generation defaults that a server does not follow: it gives each prompt
    one answer, by greedy search or sampling, and its own time limit ends a request.
    """
    for name, neutral in _SERVED_AS.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise InputError(
                f"the generation defaults hold {name}={value!r}, which a server cannot follow: it "
                "gives each prompt one answer, by greedy search or sampling, as the request says; "
                f"set {name} of the model's generation_config to {neutral!r} and export, or export "
                "without tokenizer= for use from Python alone"
            )
    if config is not None:
        try:
            refuse_settings(config)
        except InputError as error:
            raise InputError(
                f"no server can follow the generation defaults: {error}; change the model's "
                "generation_config and export"
            ) from error


def read_config(path: Path, text: bytes) -> PreTrainedConfig:
    """Raises BundleError naming `path`."""
    fields = _object(path, text)
    if not isinstance(fields.get("is_encoder_decoder", False), bool) or fields.get(
        "is_encoder_decoder"
    ):
        raise BundleError(path, "is that of an encoder-decoder, which has no programs of layers")
    names = fields.get("architectures")
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise BundleError(path, "names no architecture")
    for name in ("vocab_size", "num_hidden_layers"):
        if type(fields.get(name)) is not int:
            raise BundleError(path, f"has no whole number {name}")
    try:
        return PreTrainedConfig.from_dict(fields)  # type: ignore[return-value]
    except Exception as error:  # transformers validates some fields with errors of many kinds
        raise BundleError(path, f"is no config: {type(error).__name__} {error}") from error


def read_generation(path: Path, text: bytes) -> GenerationConfig:
    """Raises BundleError naming `path`."""
    fields = _object(path, text)
    try:
        return GenerationConfig.from_dict(fields)
    except Exception as error:  # as above
        raise BundleError(
            path, f"has no generation defaults: {type(error).__name__} {error}"
        ) from error


def _object(path: Path, text: bytes) -> dict[str, Any]:
    fields = parse_json(path, text)
    if not isinstance(fields, dict):
        raise BundleError(path, "is no JSON object")
    return fields

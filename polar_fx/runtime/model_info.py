"""What is known of a model besides its layers."""

from dataclasses import dataclass
from typing import Any

from ..capture import embedding_weight


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model besides its layers: HuggingFace's settings, and its token ids."""

    config: Any
    generation_config: Any
    vocab_size: int

    @classmethod
    def of(cls, model: Any) -> "ModelInfo":
        """That of a HuggingFace causal LM."""
        return cls(model.config, model.generation_config, embedding_weight(model).shape[0])

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return (self.config.architectures or [type(self.config).__name__])[0]

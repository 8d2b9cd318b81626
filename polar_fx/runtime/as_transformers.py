"""What transformers' pipelines and users ask of a model, beside `generate`.

Shape legend: B batch, T tokens, V vocabulary.
"""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutput

from .runner import Runner


class AsTransformers:
    """A model over a runner that answers as those of transformers do."""

    runner: Runner
    input_modalities = output_modalities = ("text",)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """`forward`, whose logits [B, T, V] are `.logits`."""
        return CausalLMOutput(logits=self.forward(*args, **kwargs))  # type: ignore[arg-type]

    def can_generate(self) -> bool:
        """Always."""
        return True

    @property
    def generation_config(self) -> GenerationConfig:
        """The settings that `generate` runs by unless a call names others."""
        return self.runner.info.generation_config or GenerationConfig()

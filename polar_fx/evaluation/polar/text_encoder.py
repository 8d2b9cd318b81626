"""A frozen text encoder beside the model, as the paper's predictor has one (PoLar, section 3):
states of a question's text.

It is what hidden states of the model itself are compared with. A request is not dispatched by it:
it would be a second model to keep and run, and it reads text where a request has token ids. Shape
legend: B texts, T tokens of the encoder, F its hidden size.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from ...errors import InputError
from ...models import load_pretrained, position_limit

_BATCH, _ENDLESS = 32, 10**9


class TextEncoder:
    """Any encoder that transformers' AutoModel loads, in float32, with its tokenizer; nothing of it
    is trained.

    Of a text longer than its positions the end is read, where the question stands; of a model with
    a decoder the encoder alone is used. Raises InputError if the tokenizer cannot pad.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        if tokenizer.pad_token_id is None:
            raise InputError(
                "the encoder's tokenizer has no padding token; set tokenizer.pad_token, as to "
                "tokenizer.eos_token"
            )
        tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
        # a tokenizer that knows no limit says 10^30
        limits = [
            n
            for n in (position_limit(model), tokenizer.model_max_length)
            if n is not None and n < _ENDLESS
        ]
        self.max_tokens = min(limits, default=None)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "TextEncoder":
        """Of a local folder or a HuggingFace id; safetensors only.

        Raises ModelNotFoundError naming the remedy.
        """
        return cls(*load_pretrained(AutoModel, source, dtype=torch.float32, what="a text encoder"))

    @property
    def size(self) -> int:
        """F."""
        return self.model.config.get_text_config().hidden_size

    @cached_property
    def fingerprint(self) -> str:
        """Of names, shapes and values of the weights, and of the vocabulary: 64 hex digits."""
        found = hashlib.sha256(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
        return found.hexdigest()

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """The last layer's states of each text, f32[T, F], of special tokens too; texts of like
        length run together.

        Raises InputError for a text without tokens.
        """
        found: dict[int, Tensor] = {}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            ids = self.tokenizer(
                [texts[i] for i in part],
                return_tensors="pt",
                padding=True,
                truncation=self.max_tokens is not None,
                max_length=self.max_tokens,
            ).to(self.model.device)
            lengths = ids["attention_mask"].sum(1).tolist()
            if 0 in lengths:
                raise InputError(
                    f"text {texts[part[lengths.index(0)]]!r} has no tokens; give a question"
                )
            hidden = self.model(**ids).last_hidden_state.float().cpu()
            found |= {
                i: states[:n].clone() for i, states, n in zip(part, hidden, lengths, strict=True)
            }
        return [found[i] for i in range(len(texts))]

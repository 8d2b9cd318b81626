"""The ways to run a model that are compared: HF eager, the whole model through torch.compile, and
polar_fx.

Shape legend: B batch, T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from polar_fx import CompiledModel, Program
from polar_fx.backends import ShapeClass
from polar_fx.capture import CACHE
from polar_fx.runtime.link import StepInputs

WHOLE = "whole-model torch.compile"


class Contender(ABC):
    """One way to run the model: `prefill` starts over, `decode` appends one token to what is
    there.
    """

    kind: ClassVar[str] = "polar_fx"

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps

    @abstractmethod
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [B, V] of the last token of ids i64[B, T]."""

    @abstractmethod
    def decode(self, token: Tensor) -> Tensor:
        """Logits [B, V] after one more token i64[B, 1]."""

    def finish(self) -> None:
        """End of a round."""


class HfEager(Contender):
    kind = "hf"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__("HF eager, dynamic cache", model.config.num_hidden_layers)
        self.model = model

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self.model(ids, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]

    def decode(self, token: Tensor) -> Tensor:
        return self.model(token, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]


class HfCompiled(Contender):
    """What users would pick instead: `torch.compile(model)`, static shapes, a static cache."""

    kind = "hf"

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__(WHOLE + ", static cache", model.config.num_hidden_layers)
        config = model.config
        self.model = torch.compile(model, dynamic=False)
        self.cache = StaticCache(config=config, max_cache_len=length)
        heads = config.num_key_value_heads
        self.cache.early_initialization(
            1, heads, config.hidden_size // config.num_attention_heads, model.dtype, model.device
        )

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache.reset()
        return self.model(ids, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]

    def decode(self, token: Tensor) -> Tensor:
        return self.model(token, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]


class Ours(Contender):
    """A compiled model on one program."""

    def __init__(self, compiled: CompiledModel, label: str, *, program: Program) -> None:
        super().__init__(f"polar_fx {label}", program.num_steps)
        self.compiled, self.program = compiled, program

    def open(self, batch: int) -> Any:
        """A context manager giving the session that runs."""
        return self.compiled.session(self.program, batch)

    def prefill(self, ids: Tensor) -> Tensor:
        self.context = self.open(ids.shape[0])
        self.session = self.context.__enter__()
        return torch.stack(self.compiled.prefill(self.program, self.session, list(ids)))

    def decode(self, token: Tensor) -> Tensor:
        return self.compiled.decode(self.program, self.session, token[:, 0])

    def finish(self) -> None:
        self.context.__exit__(None, None, None)


class WithoutLastStep(Ours):
    """A prefill whose last step runs for every token; the head for the last one, as always."""

    def prefill(self, ids: Tensor) -> Tensor:
        compiled = self.compiled
        slots = compiled.runner.open_slots(self.program, ids.shape[0])
        self.context = slots
        session = self.session = slots.__enter__()
        batch, tokens = ids.shape
        linked = compiled.linker.link(
            self.program, ShapeClass.of(batch, tokens, compiled.pool.length)
        )
        positions = session.positions([tokens] * batch)
        with torch.no_grad():
            *_, hidden = linked.states(StepInputs.of(session, ids, positions=positions))
            one = compiled.linker.link(self.program, ShapeClass.of(batch, 1, compiled.pool.length))
            inputs = [ids[:, -1:].contiguous(), positions[:, -1:].contiguous(), one.kv_index]
            logits = one.chain.head(hidden[:, -1:].contiguous(), one.chain.start(inputs))
        session.advance([tokens] * batch)
        return logits[:, 0]


def programs_of(depth: int) -> dict[str, Program]:
    """Programs of a quarter to twice the depth: skipping in blocks or every other layer, and
    repeating.
    """
    identity, half = Program.identity(depth), depth // 2
    return {
        "identity": identity,
        "every second layer": Program.from_path(tuple(range(0, depth, 2)), depth),
        "middle half skipped": identity.skip(depth // 4, half),
        "a quarter skipped": identity.skip(depth // 2, depth // 4),
        "a quarter kept": identity.skip(depth // 8, depth - depth // 4),
        "middle half repeated": identity.repeat(depth // 4, half, 2),
        "all repeated": identity.repeat(0, depth, 2),
    }

"""The ways to run a model that the GPU benchmark compares, on the contenders of the other
benchmarks.

Shape legend: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from contenders import Contender, HfEager, Ours
from gpu_worker import Worker
from polar_fx import CompiledModel, Program
from polar_fx.capture import CACHE

__all__ = ["HfEager", "HfReduceOverhead", "Linked", "Whole", "slot_length"]


def slot_length(max_length: int) -> int:
    """Columns of a slot for rows of `max_length` tokens: one is spare, and they are a multiple of
    16.
    """
    return -(-(max_length + 1) // 16) * 16


class HfReduceOverhead(Contender):
    """transformers' model in `torch.compile(mode="reduce-overhead")` on a static cache; prompts
    eagerly, as its `generate` does.

    With `interpreted`, traced and not compiled: for a trial run.
    """

    kind = "hf"

    def __init__(
        self, model: PreTrainedModel, batch: int, *, max_length: int, interpreted: bool = False
    ) -> None:
        super().__init__("HF compile", model.config.num_hidden_layers)
        config, self.model = model.config, model
        how: dict[str, Any] = {"backend": "eager"} if interpreted else {"mode": "reduce-overhead"}
        self.compiled: Any = torch.compile(model, dynamic=False, **how)
        self.cache = StaticCache(config=config, max_cache_len=slot_length(max_length))
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(
            batch, config.num_key_value_heads, size, model.dtype, model.device
        )

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache.reset()
        return self.model(ids, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]

    def decode(self, token: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(token, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1]


class Linked(Ours):
    """Linked regions; with `graph`, passes replay captured CUDA graphs where there is a GPU."""

    def __init__(self, compiled: CompiledModel, program: Program, *, graph: bool = True) -> None:
        super().__init__(compiled, "linked", program=program)
        self.graphs = compiled.graphs if graph else None
        self.is_open = False

    def prefill(self, ids: Tensor) -> Tensor:
        self.finish()
        self.is_open = True
        with self._by_its_graphs():
            return super().prefill(ids)

    def decode(self, token: Tensor) -> Tensor:
        with self._by_its_graphs():
            return super().decode(token)

    @contextmanager
    def _by_its_graphs(self) -> Iterator[None]:
        kept, self.compiled.graphs = self.compiled.graphs, self.graphs
        try:
            yield
        finally:
            self.compiled.graphs = kept

    def graph(self) -> Any:
        """The graph that was used last, to be replayed alone; None without one."""
        return None if self.graphs is None else self.graphs.cache.last_used

    def finish(self) -> None:
        if self.is_open:
            self.is_open = False
            super().finish()


class Whole(Linked):
    """One row by the program as one graph through Inductor, in one CUDA graph: a bound for what
    linking costs.

    Prompts run as linked regions. With `interpreted`, traced and not compiled: for a trial run.
    """

    def __init__(
        self,
        worker: Worker,
        compiled: CompiledModel,
        *,
        program: Program,
        interpreted: bool = False,
    ) -> None:
        super().__init__(compiled, program, graph=False)
        flat = compiled.library.flat_graph(program).requires_grad_(False)
        how: dict[str, Any] = {"backend": "eager"} if interpreted else {}
        self.flat: Any = torch.compile(flat, dynamic=False, fullgraph=True, **how)
        self.worker, self.captured = worker, None
        self.logits: Tensor

    def open(self, batch: int) -> Any:
        return self.compiled.runner.open_slots(self.program, batch)

    def decode(self, token: Tensor) -> Tensor:
        session = self.session
        at = session.positions([1])
        if self.captured is None:
            self.ids, self.at = token.clone(), at.clone()
            slots = [t for pair in session.slots for t in pair]

            def run() -> None:
                self.logits = self.flat(self.ids, self.at, self.compiled.pool.kv_index, *slots)

            self.captured = self.worker.captured(run)
        self.ids.copy_(token)
        self.at.copy_(at)
        self.captured.replay()
        session.advance([1])
        return self.logits[:, -1].clone()

    def graph(self) -> Any:
        return self.captured

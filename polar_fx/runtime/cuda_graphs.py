"""Captured decodes: on CUDA a linked program is one launch a token instead of one for every kernel.

A linked decode is a fixed sequence of kernels on fixed addresses. It is captured into a CUDA graph
when it first runs and replayed from then on.

Shape legend: B batch, V vocabulary; a decode is of one token a row.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .graph_api import CudaApi, GraphApi
from .graph_cache import Captured, GraphCache, GraphRecord
from .link import LinkedProgram, StepInputs

# Linked program, batch and the addresses of the slots.
_Key = tuple[int, ...]

# Shape and type of a run's logits.
_Output = tuple[torch.Size, torch.dtype]


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Buffers:
    """What goes in and comes out at fixed addresses: ids and positions i64[B, 1], logits [B, 1, V].

    Allocated outside the pool and shared by all graphs of a batch size, so that no graph keeps
    anything in the pool.
    """

    ids: Tensor
    positions: Tensor
    logits: Tensor

    def fill(self, inputs: StepInputs) -> None:
        self.ids.copy_(inputs.ids)
        self.positions.copy_(inputs.positions)


@dataclass(frozen=True, eq=False, slots=True)
class _Held:
    """What must outlive a graph: the linked program owns the weights and keeps its id from being
    another's.

    Slots are not held. Only a caller whose slots lie at the captured addresses meets the graph, and
    those it holds itself.
    """

    linked: LinkedProgram
    buffers: _Buffers


class CudaGraphs:
    """Runs linked decodes of one model as CUDA graphs, kept in a `GraphCache` of at most `limit`.

    Rows in lock-step have theirs in the same cache (`LockstepGraphs`).
    """

    def __init__(self, api: GraphApi, limit: int = 64) -> None:
        self.cache = GraphCache(api, limit)
        self._buffers: WeakValueDictionary[tuple[Any, ...], _Buffers] = WeakValueDictionary()
        self._loaded: set[tuple[int, Hashable]] = set()
        self._outputs: dict[int, _Output] = {}  # by number of rows

    @property
    def records(self) -> tuple[GraphRecord, ...]:
        """The latest attempts to capture, oldest first."""
        return self.cache.records

    def __len__(self) -> int:
        return len(self.cache)

    def run(self, linked: LinkedProgram, inputs: StepInputs) -> Tensor:
        """Logits [B, 1, V] of one token a row, a tensor of the caller's own.

        Writes the slots in place. The first run of a program, batch size and set of slots captures
        and replays. Where it needs code that has not run for this batch size yet, the first run is
        an ordinary one, and the capture follows it; a program that cannot be captured runs as it is
        linked. Sessions of a program meet their graph again as far as the pool hands out the same
        slots in the same order. Raises ProgramError as `LinkedProgram.run` does.
        """
        batch, tokens = inputs.ids.shape
        assert tokens == 1 and inputs.resume is None, "a decode is of one token a row"
        linked.check(inputs)
        # not the address of kv_index: it is the linked program's own
        key = (id(linked), batch, *(t.data_ptr() for pair in inputs.slots for t in pair))
        with self.cache.lock:
            captured = self.cache.find(key)
            if captured is None:
                worthwhile = self.cache.is_worthwhile((linked.program, batch))
                loaded = worthwhile and self._is_loaded(linked, batch)
                out = self._outputs.get(batch) if loaded else None
                if out is not None:
                    captured = self._capture(key, linked, inputs=inputs, out=out)
                if captured is None:
                    # This loads the kernels as well, which a capture must not do. It need not
                    # happen on the side stream: what is loaded is the device's, and the side stream
                    # is to be kept free (see CudaApi).
                    logits = linked.run(inputs)
                    if worthwhile and out is None:
                        out = self._outputs[batch] = logits.shape, logits.dtype
                        self._loaded |= _code(linked, batch)
                        self._capture(key, linked, inputs=inputs, out=out)
                    return logits
            self.cache.mark(key, captured)
            held: _Held = captured.held
            held.buffers.fill(inputs)
            captured.graph.replay()
            return held.buffers.logits.clone()

    def _is_loaded(self, linked: LinkedProgram, batch: int) -> bool:
        """Whether every kernel of a run is on the device, because programs of the same regions have
        run.
        """
        return _code(linked, batch) <= self._loaded

    def _capture(
        self,
        key: _Key,
        linked: LinkedProgram,
        *,
        inputs: StepInputs,
        out: _Output,
    ) -> Captured | None:
        """Capture such a run; on failure, remember and log the reason."""
        buffers = self._static(inputs, out)
        at_buffers = replace(inputs, ids=buffers.ids, positions=buffers.positions)
        self.cache.wait()  # a graph that uses these buffers may still run on another stream
        # A capture writes nothing. Should a part of it run after all, it writes this token's keys
        # and values once more.
        buffers.fill(inputs)
        return self.cache.capture(
            key,
            lambda: buffers.logits.copy_(linked.run(at_buffers)),
            program=linked.program,
            batch=len(inputs.ids),
            held=_Held(linked, buffers),
            subject=(linked.program, len(inputs.ids)),
        )

    def _static(self, inputs: StepInputs, out: _Output) -> _Buffers:
        shape, dtype = out
        key = (shape, dtype, inputs.ids.dtype)
        if (buffers := self._buffers.get(key)) is None:
            # or they could not be filled outside of inference mode again
            with torch.inference_mode(False):
                ids, places = (
                    torch.empty(t.shape, dtype=t.dtype, device=t.device)
                    for t in (inputs.ids, inputs.positions)
                )
                logits = torch.empty(shape, dtype=dtype, device=inputs.positions.device)
            buffers = self._buffers[key] = _Buffers(ids, places, logits)
        return buffers


def cuda_graphs(device: torch.device, *, states: bool = False) -> CudaGraphs | None:
    """Those of a device; None if it has none, and for a model that keeps states: to capture a
    decode may run a part of it, which a state would not forget.
    """
    return CudaGraphs(CudaApi(device)) if device.type == "cuda" and not states else None


def _code(linked: LinkedProgram, batch: int) -> set[tuple[int, Hashable]]:
    """What decides the kernels of a run: its regions, whether it blends, and the number of rows."""
    chain = linked.chain
    assert chain.epilogue is not None
    regions: list[Hashable] = [
        chain.prologue,
        chain.epilogue.code,
        *(step.code for step in chain.steps),
    ]
    blends: list[Hashable] = ["blend"] if any(step.closes for step in chain.steps) else []
    return {(batch, part) for part in regions + blends}

"""Captured passes: on CUDA a linked program is one launch a pass instead of one for every kernel.

A linked decode is a fixed sequence of kernels on fixed addresses. It is captured into a CUDA graph
when it first runs and replayed from then on. So is a prompt, whose number of tokens is padded to
one of few (`token_rows.padded_count`), when a program meets that number on the same slots for the
second time: many are met once, and to capture takes longer than to run.

Shape legend: B batch, T tokens of a row, V vocabulary; a decode is of one token a row.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .graph_api import CudaApi, GraphApi
from .graph_cache import Captured, GraphCache, GraphRecord
from .link import LinkedProgram, StepInputs

# Linked program, batch, tokens and the addresses of the slots.
_Key = tuple[int, ...]

# Tokens of all rows of a prompt that is captured: with more, the device takes longer than the host
# takes to launch, and what a graph computes in between would take much memory.
MOST_TOKENS = 1024

# Graphs of prompts that are kept, beside those of decodes, which are used far more often.
MOST_PROMPTS = 32

_MAX_MET = 1024  # prompts that are remembered

# Shape and type of a run's logits.
_Output = tuple[torch.Size, torch.dtype]


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Buffers:
    """What goes in and comes out at fixed addresses: ids and positions i64[B, T], of a prompt the
    token of each row whose logits are wanted, i64[B]; and logits [B, 1, V].

    Allocated outside the pool and shared by all graphs of as many rows and tokens, so that no
    graph keeps anything in the pool.
    """

    ids: Tensor
    positions: Tensor
    logits_at: Tensor | None
    logits: Tensor

    def fill(self, inputs: StepInputs) -> None:
        self.ids.copy_(inputs.ids)
        self.positions.copy_(inputs.positions)
        if self.logits_at is not None and inputs.logits_at is not None:
            self.logits_at.copy_(inputs.logits_at)


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
    """Runs linked passes of one model as CUDA graphs: decodes of at most `limit` in a `GraphCache`,
    prompts in another.

    Rows in lock-step have theirs in the cache of decodes (`LockstepGraphs`). Without
    `captures_prompts`, prompts run as they are linked.
    """

    def __init__(self, api: GraphApi, limit: int = 64, *, captures_prompts: bool = True) -> None:
        self.cache = GraphCache(api, limit)
        self._api = api
        self._prompts: GraphCache | None = None
        self._most_prompts = min(limit, MOST_PROMPTS) if captures_prompts else 0
        self._buffers: WeakValueDictionary[tuple[Any, ...], _Buffers] = WeakValueDictionary()
        self._loaded: set[tuple[int, Hashable]] = set()
        self._outputs: dict[int, _Output] = {}  # of decodes, by number of rows
        # of prompts that ran once since a capture, by thread and key; the latest last
        self._met: OrderedDict[Hashable, _Output] = OrderedDict()

    @property
    def records(self) -> tuple[GraphRecord, ...]:
        """The latest attempts to capture decodes, oldest first; `prompts` has its own."""
        return self.cache.records

    @property
    def prompts(self) -> GraphCache:
        """Graphs of prompts. They are apart: a prompt is used once where a decode is for every
        token, and would always be the one to drop; one that cannot be captured says nothing of
        decodes.
        """
        with self.cache.lock:
            if self._prompts is None:
                self._prompts = GraphCache(self._api, self._most_prompts)
            return self._prompts

    def __len__(self) -> int:
        return len(self.cache)

    def run(self, linked: LinkedProgram, inputs: StepInputs) -> Tensor:
        """Logits [B, 1, V] of one token a row, a tensor of the caller's own; of a prompt whose
        every token is asked for, or of more than `MOST_TOKENS`, as it is linked.

        Writes the slots in place. The first run of a program, batch size and set of slots captures
        and replays. Where it needs code that has not run for this batch size yet, the first run is
        an ordinary one, and the capture follows it; a program that cannot be captured runs as it is
        linked. Sessions of a program meet their graph again as far as the pool hands out the same
        slots in the same order. A prompt is captured where the program meets its rows and tokens
        again on the same slots. Raises ProgramError as `LinkedProgram.run` does.
        """
        batch, tokens = inputs.ids.shape
        linked.check(inputs)
        if tokens > 1:
            return self._run_prompt(linked, inputs)
        assert inputs.resume is None, "a decode begins at the first step"
        key = _key(linked, inputs)
        with self.cache.lock:
            captured = self.cache.find(key)
            if captured is None:
                worthwhile = self.cache.is_worthwhile((linked.program, batch))
                loaded = worthwhile and self._is_loaded(linked, batch)
                out = self._outputs.get(batch) if loaded else None
                if out is not None:
                    captured = self._capture(key, linked, inputs=inputs, out=out, cache=self.cache)
                if captured is None:
                    # This loads the kernels as well, which a capture must not do. It need not
                    # happen on the side stream: what is loaded is the device's, and the side stream
                    # is to be kept free (see CudaApi).
                    logits = linked.run(inputs)
                    if worthwhile and out is None:
                        out = self._outputs[batch] = logits.shape, logits.dtype
                        self._loaded |= _code(linked, batch)
                        self._capture(key, linked, inputs=inputs, out=out, cache=self.cache)
                    return logits
            return _replayed(self.cache, key, captured=captured, inputs=inputs)

    def _run_prompt(self, linked: LinkedProgram, inputs: StepInputs) -> Tensor:
        """The same for several tokens a row."""
        batch, tokens = inputs.ids.shape
        if inputs.logits_at is None or inputs.resume is not None or batch * tokens > MOST_TOKENS:
            return linked.run(inputs)
        key = _key(linked, inputs)
        # a thread has attention plans of its own, which cannot be made in a capture
        met, cache = (threading.get_ident(), key), self.prompts
        with cache.lock:
            captured, out = cache.find(key), self._met.pop(met, None)
            subject = linked.program, batch
            if captured is None and out is not None and cache.is_worthwhile(subject):
                captured = self._capture(key, linked, inputs=inputs, out=out, cache=cache)
            if captured is not None:
                return _replayed(cache, key, captured=captured, inputs=inputs)
        logits = linked.run(inputs)  # loads what a capture must not load
        with cache.lock:
            self._met[met] = logits.shape, logits.dtype
            if len(self._met) > _MAX_MET:
                self._met.popitem(last=False)
        return logits

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
        cache: GraphCache,
    ) -> Captured | None:
        """Capture such a run; on failure, remember and log the reason."""
        buffers = self._static(inputs, out)
        at_buffers = replace(
            inputs, ids=buffers.ids, positions=buffers.positions, logits_at=buffers.logits_at
        )
        rows, tokens = inputs.ids.shape
        cache.wait()  # a graph that uses these buffers may still run on another stream
        # A capture writes nothing. Should a part of it run after all, it writes this token's keys
        # and values once more.
        buffers.fill(inputs)
        return cache.capture(
            key,
            lambda: buffers.logits.copy_(linked.run(at_buffers)),
            program=linked.program,
            batch=rows,
            held=_Held(linked, buffers),
            subject=(linked.program, rows),
            tokens=tokens,
        )

    def _static(self, inputs: StepInputs, out: _Output) -> _Buffers:
        shape, dtype = out
        key = (shape, dtype, inputs.ids.shape, inputs.ids.dtype)
        if (buffers := self._buffers.get(key)) is None:
            # or they could not be filled outside of inference mode again
            with torch.inference_mode(False):
                ids, places, logits_at = (
                    t if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
                    for t in (inputs.ids, inputs.positions, inputs.logits_at)
                )
                logits = torch.empty(shape, dtype=dtype, device=inputs.positions.device)
            assert ids is not None and places is not None
            buffers = self._buffers[key] = _Buffers(ids, places, logits_at, logits)
        return buffers


def cuda_graphs(
    device: torch.device, *, states: bool = False, captures_prompts: bool = True
) -> CudaGraphs | None:
    """Those of a device; None if it has none, and for a model that keeps states: to capture a
    decode may run a part of it, which a state would not forget.
    """
    if device.type != "cuda" or states:
        return None
    return CudaGraphs(CudaApi(device), captures_prompts=captures_prompts)


def _replayed(cache: GraphCache, key: _Key, *, captured: Captured, inputs: StepInputs) -> Tensor:
    """The logits of a graph, which is run with these inputs."""
    cache.mark(key, captured)
    held: _Held = captured.held
    held.buffers.fill(inputs)
    captured.graph.replay()
    return held.buffers.logits.clone()


def _key(linked: LinkedProgram, inputs: StepInputs) -> _Key:
    # not the address of kv_index: it is the linked program's own
    slots = (t.data_ptr() for parts in inputs.slots for t in parts)
    return (id(linked), *inputs.ids.shape, *slots)


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

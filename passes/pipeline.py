"""Pipelines: an order of passes with a text form, verified between passes, logged as counts."""

import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule

from .address_kv import AddressKv
from .assign_kv_slots import AssignKvSlots
from .attention_over_blocks import AttentionOverBlocks
from .attention_to_reduction import AttentionToReduction
from .base import Pass, PassResult
from .dedupe_layers import DedupeLayers
from .eliminate_dead_code import EliminateDeadCode
from .eliminate_noops import EliminateNoops
from .grouped_linear import GroupedLinear
from .inline_layers import InlineLayers
from .keep_kv_writes import KeepKvWrites
from .linear_to_onednn import LinearToOneDnn
from .linear_to_row_kernel import LinearToRowKernel
from .matvec_to_reduction import MatvecToReduction
from .outline_layers import OutlineLayers
from .quantized_linear import QuantizedLinear
from .schedule_layers import Blends, ScheduleLayers
from .verify import verify, verify_region

log = logging.getLogger("polar_fx.passes")

PASSES: dict[str, type[Pass]] = {
    p.name: p
    for p in (
        EliminateNoops,
        EliminateDeadCode,
        OutlineLayers,
        DedupeLayers,
        ScheduleLayers,
        AssignKvSlots,
        InlineLayers,
        KeepKvWrites,
        AddressKv,
        QuantizedLinear,
        GroupedLinear,
        MatvecToReduction,
        LinearToRowKernel,
        LinearToOneDnn,
        AttentionToReduction,
        AttentionOverBlocks,
    )
}


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its name, whether it changed the graph, counts, wall time in
    milliseconds.
    """

    name: str
    modified: bool
    counts: dict[str, int | str]
    time_ms: float


_KEPT: ContextVar[list[PassRecord] | None] = ContextVar("kept records", default=None)


@contextlib.contextmanager
def kept_records() -> Generator[list[PassRecord]]:
    """A list that gets the records of every pipeline that this thread runs meanwhile: how whoever
    has a backend compile a region learns what the backend's passes did.
    """
    kept: list[PassRecord] = []
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)


def keep_records(records: Iterable[PassRecord]) -> None:
    """Add records to the list that is open, if one is: of a pipeline, or from another process."""
    if (kept := _KEPT.get()) is not None:
        kept.extend(records)


@dataclass(frozen=True)
class PipelineResult:
    """The final graph and one record per pass."""

    graph_module: GraphModule
    records: tuple[PassRecord, ...]

    @property
    def modified(self) -> bool:
        return any(r.modified for r in self.records)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str(pipeline)` parses back with `Pipeline.parse`.

    `verifier` raises VerifyError for a graph that no pass may leave: it looks at the first one and
    at each that a pass changed, unless `verify_each` is off.
    """

    passes: tuple[Pass, ...]
    verify_each: bool = field(default=True, compare=False)
    verifier: Callable[[GraphModule], None] = field(default=verify, compare=False, repr=False)

    def run(
        self, gm: GraphModule, on_pass: Callable[[Pass, PassResult], None] | None = None
    ) -> PipelineResult:
        """Run all passes; raises PassError or VerifyError.

        `on_pass` sees each result, for printing.
        """
        records: list[PassRecord] = []
        if self.verify_each:
            self.verifier(gm)
        for p in self.passes:
            start = time.perf_counter()
            result = p.run(gm)
            gm = result.graph_module
            if self.verify_each and result.modified:
                self.verifier(gm)
            records.append(
                PassRecord(
                    p.name,
                    result.modified,
                    dict(result.counts),
                    1e3 * (time.perf_counter() - start),
                )
            )
            log.info(
                "%s: %s",
                p.name,
                ", ".join(f"{k} {v}" for k, v in result.counts.items()) or "unchanged",
            )
            if on_pass is not None:
                on_pass(p, result)
        keep_records(records)
        return PipelineResult(gm, tuple(records))

    @property
    def content_id(self) -> str:
        """Joins the variant key: changes with any pass, its source or its options."""
        return "+".join(p.content_id for p in self.passes)

    def __str__(self) -> str:
        return ",".join(p.spec() for p in self.passes)

    @classmethod
    def parse(cls, text: str) -> "Pipeline":
        """Inverse of `str`: `name`, or `name{"option":value}`, separated by commas.

        Raises ValueError with the column of the fault; unknown names list the known ones.
        """
        passes: list[Pass] = []
        at = 0
        while at < len(text):
            match = re.compile(r"\s*([a-z][a-z0-9-]*)").match(text, at)
            if not match:
                raise ValueError(f"column {at + 1}: expected a pass name in {text!r}")
            pass_type, at, options = _known(match[1]), match.end(), {}
            if text[at : at + 1] == "{":
                try:
                    options, at = json.JSONDecoder().raw_decode(text, at)
                    passes.append(pass_type(**options))
                except (json.JSONDecodeError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"column {at + 1}: bad options of {match[1]}: {error}"
                    ) from error
            else:
                passes.append(pass_type())
            if at < len(text) and text[at] != ",":
                raise ValueError(f"column {at + 1}: expected ',' in {text!r}")
            at += 1
        return cls(tuple(passes))


def _known(name: str) -> type[Pass]:
    if name not in PASSES:
        raise ValueError(f"unknown pass {name!r}; known: {', '.join(sorted(PASSES))}")
    return PASSES[name]


def library_pipeline() -> Pipeline:
    """Flat captured graph -> prologue, distinct layer graphs, epilogue."""
    return Pipeline(
        (
            EliminateNoops(),  # tracing noise would hide equal layers
            EliminateDeadCode(),  # sizes and weights nobody reads would become operands
            OutlineLayers(),
            DedupeLayers(),
        )
    )


def program_pipeline(path: Iterable[int], blends: Blends = ()) -> Pipeline:
    """Layer graph -> step graph of one program."""
    return Pipeline(
        (
            ScheduleLayers(tuple(path), blends),
            AssignKvSlots(),  # repeats are only right with a slot of their own
            EliminateDeadCode(),  # side values and weights of layers that are gone
        )
    )


def region_pipeline(passes: Iterable[Pass], operands: Sequence[Tensor] | None = None) -> Pipeline:
    """Graph of one region -> another that its callers may call, which take `operands` by position;
    None while a pass may still change what they are.
    """
    return Pipeline(tuple(passes), verifier=functools.partial(verify_region, operands=operands))


def flat_pipeline() -> Pipeline:
    """Step graph -> one flat graph, for compiling a program as a whole or exporting it."""
    return Pipeline((InlineLayers(), EliminateDeadCode()))

"""What a compiled model holds and how it came by it, in words and as JSON.

`report` only looks: it traces nothing, compiles nothing and touches no artifact.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from ..library import LayerLibrary
from ..output.markup import preformatted
from ..output.plain_text import count, dtype_name, ranges, size, table
from ..passes.address_kv import BLOCK
from ..passes.pipeline import PassRecord
from ..program import Program
from ..runtime.code_key import RegionRecord
from ..runtime.runner import Runner
from ..runtime.tiers import TierRecord
from ..store import total_bytes


@dataclass(frozen=True)
class Kind:
    """Layers that share one graph, and so its regions; `weight_bytes` are those of one layer.

    The ends have no layers.
    """

    body: str
    layers: tuple[int, ...]
    weight_bytes: int


@dataclass(frozen=True)
class StoreReport:
    """The artifact store: its entries are of all models; `limit_bytes` 0 is no limit; `refused`
    lists keys and reasons.
    """

    folder: str
    num_entries: int
    num_bytes: int
    limit_bytes: int
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Report:
    """What a compiled model holds and how it came by it.

    `capture_s` and `layer_path` are None, and `passes` empty, if nothing was traced in this
    process; what passes did to the graph of one region is in its record. `num_programs` counts
    linked programs. Weights are the model's own, each tensor counted once; KV slots hold
    L = `kv_length` tokens a row.
    """

    model: str
    depth: int
    dtype: str
    device: str
    backend: str
    max_length: int
    is_traced: bool
    capture_s: float | None
    layer_path: str | None
    kinds: tuple[Kind, ...]
    passes: tuple[PassRecord, ...]
    regions: tuple[RegionRecord, ...]
    num_programs: int
    tier: str
    tiers: tuple[TierRecord, ...]
    weight_bytes: int
    num_weights: int
    kv_bytes: int
    num_kv_slots: int
    num_kv_blocks: int
    kv_length: int
    store: StoreReport | None

    @property
    def totals(self) -> dict[str, float]:
        """Regions compiled and the seconds of the slowest (several are compiled at once), regions
        loaded and the seconds of all, their bytes, and the bytes of weights and KV slots.
        """
        compiled_s = [region.seconds for region in self.regions if region.source == "compiled"]
        loaded_s = [region.seconds for region in self.regions if region.source == "loaded"]
        return {
            "num_compiled": len(compiled_s),
            "slowest_compiled_s": max(compiled_s, default=0.0),
            "num_loaded": len(loaded_s),
            "loaded_s": sum(loaded_s),
            "region_bytes": sum(r.num_bytes for r in self.regions),
            "held_bytes": self.weight_bytes + self.kv_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json` writes and reads back unchanged."""
        return {**plain(self), "totals": self.totals}

    def text(self) -> str:
        """Tables for a terminal."""
        return "\n".join(_report_lines(self))

    __str__ = text

    def _repr_html_(self) -> str:
        return preformatted(self.text())


def report(runner: Runner) -> Report:
    """What `runner` holds by now."""
    library, regions, pool = runner.library, runner.regions, runner.pool
    captured = library.captured if library.is_traced else None
    store = None
    if regions.store is not None:
        entries = regions.store.entries()
        refused = tuple((r.key, r.reason) for r in regions.store.refusals)
        store = StoreReport(
            str(regions.store.root),
            len(entries),
            total_bytes(entries),
            regions.store.limit_bytes,
            refused,
        )
    return Report(
        model=runner.info.architecture,
        depth=library.depth,
        dtype=dtype_name(library.dtype),
        device=str(library.device),
        backend=runner.backend.name,
        max_length=pool.max_length,
        is_traced=library.is_traced,
        capture_s=captured and captured.seconds,
        layer_path=captured and captured.layer_path,
        kinds=kinds_of(library),
        passes=library.records if captured else (),
        regions=tuple(regions.records),
        num_programs=len(runner.linker.programs | runner.lockstep.programs),
        tier=runner.tiers.tier,
        tiers=tuple(replace(t) for t in runner.tiers.records),
        weight_bytes=tensor_bytes(library.tensors.values()),
        num_weights=len(_distinct(library.tensors.values())),
        kv_bytes=pool.num_bytes + runner.lockstep.store.num_bytes,
        num_kv_slots=pool.num_slots,
        num_kv_blocks=runner.lockstep.store.num_allocated,
        kv_length=pool.length,
        store=store,
    )


def kinds_of(library: LayerLibrary) -> tuple[Kind, ...]:
    """Prologue, the kinds of layers, epilogue."""
    found: dict[str, list[int]] = {}
    for layer, call in enumerate(library.layers):
        found.setdefault(call.target, []).append(layer)
    layers = [
        Kind(body, tuple(of), tensor_bytes(library.layers[of[0]].weights))
        for body, of in found.items()
    ]
    start, head = (
        Kind(call.target, (), tensor_bytes(call.weights))
        for call in (library.prologue, library.epilogue)
    )
    return (start, *layers, head)


def _distinct(tensors: Iterable[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Tensors by place and size: tied ones are one."""
    return {(t.data_ptr(), t.numel() * t.element_size()): t for t in tensors}


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, tied ones counted once."""
    return sum(num_bytes for _, num_bytes in _distinct(tensors))


def plain(value: Any) -> Any:
    """Dataclasses, tuples and programs as dicts, lists and text."""
    if isinstance(value, Program):
        return str(value)
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _report_lines(r: Report) -> Iterator[str]:
    kinds, totals = [k for k in r.kinds if k.layers], r.totals
    where = f"{r.dtype} on {r.device}, backend {r.backend}"
    yield (
        f"{r.model}: {count(r.depth, 'layer')}, {where}, up to {count(r.max_length, 'token')} a row"
    )
    yield ""
    if r.is_traced:
        yield f"captured  in {r.capture_s:.1f} s, layers at {r.layer_path}"
    else:
        yield "captured  earlier: from the symbol table on disk; nothing was traced, so no pass ran"
    yield f"layers    {r.depth} -> {count(len(kinds), 'kind')}"
    yield f"weights   {size(r.weight_bytes)} in {count(r.num_weights, 'tensor')}, each counted once"
    yield (
        f"KV pool   {size(r.kv_bytes)} in {count(r.num_kv_slots, 'slot')} of "
        f"{count(r.kv_length, 'token')} and {count(r.num_kv_blocks, 'block')} of "
        f"{count(BLOCK, 'token')}"
    )
    yield f"linked    {count(r.num_programs, 'program')}"
    slowest = (
        f", the slowest in {totals['slowest_compiled_s']:.1f} s" if totals["num_compiled"] else ""
    )
    loaded = f", {totals['num_loaded']} loaded in {totals['loaded_s']:.2f} s"
    yield (
        f"regions   {totals['num_compiled']} compiled{slowest}{loaded}, "
        f"{size(totals['region_bytes'])}"
    )
    yield f"tier 1    {r.tier}" + (
        "" if r.tier != "linked" else ": whole programs are not compiled"
    )
    yield from _store_lines(r.store)
    yield ""
    rows = [
        (k.body, ranges(k.layers), str(len(k.layers) or 1), size(k.weight_bytes)) for k in r.kinds
    ]
    yield from table(
        ("graph", "layers", "calls", "weights each"), rows, right=("calls", "weights each")
    )
    if r.passes:
        yield ""
        rows = [(p.name, _counts(p), f"{p.time_ms:.0f}") for p in r.passes]
        yield from table(("pass", "what it did", "ms"), rows, right=("ms",))
    if r.regions:
        yield ""
        rows = [
            (g.body, g.shapes, g.source, f"{g.seconds:.2f}", size(g.num_bytes)) for g in r.regions
        ]
        yield from table(("region", "shapes", "how", "s", "size"), rows, right=("s", "size"))
        yield from _region_passes(r.regions)
    if r.tiers:
        yield ""
        yield from _tier_table(r.tiers)


def _store_lines(store: StoreReport | None) -> Iterator[str]:
    if store is None:
        yield "store     none: nothing is kept for later processes"
        return
    limit = f" of {size(store.limit_bytes)}" if store.limit_bytes else ""
    entries = f"{store.num_entries:,} {'entry' if store.num_entries == 1 else 'entries'}"
    yield (
        f"store     {entries}, {size(store.num_bytes)}{limit}, {len(store.refused)} "
        f"refused, in {store.folder}"
    )
    yield from (f"          {key[:12]} refused: {reason}" for key, reason in store.refused)


def _region_passes(regions: Iterable[RegionRecord]) -> Iterator[str]:
    """What passes changed in the graphs of regions; most leave most graphs as they are."""
    rows = [
        (region.body, region.shapes, record.name, _counts(record), f"{record.time_ms:.0f}")
        for region in regions
        for record in region.passes
        if record.modified
    ]
    if rows:
        yield ""
        yield from table(("region", "shapes", "pass", "what it did", "ms"), rows, right=("ms",))


def _counts(record: PassRecord) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.counts.items()) or "unchanged"


def _tier_table(records: Iterable[TierRecord]) -> list[str]:
    def ms(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    cells = [
        (
            str(t.program),
            t.phase,
            t.state,
            str(t.calls),
            f"{t.compile_s:.1f}",
            ms(t.linked_ms),
            ms(t.whole_ms),
            size(t.num_bytes),
            t.reason,
        )
        for t in records
    ]
    numbers = ("calls", "compile s", "linked ms", "whole ms", "size")
    return table(("program", "phase", "state", *numbers, "why"), cells, right=numbers)

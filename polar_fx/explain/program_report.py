"""What one program would run, in words, as JSON and as a picture; `report` is about the whole
compiled model.

Both only look: they trace nothing, compile nothing, load nothing and touch no artifact.

Shape legend: B batch, T tokens, L KV length.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..backends.base import PersistentBackend, RegionName, ShapeClass
from ..errors import InputError, NotSegmentableError
from ..output.files import write_whole
from ..output.markup import preformatted
from ..output.plain_text import count, ranges, size, table
from ..program import Program
from ..runtime.runner import Runner
from ..runtime.tiers import TierRecord
from ..store import Entry
from .drawing import program_svg
from .model_report import Kind, Report, kinds_of, plain, report, tensor_bytes
from .picture import picture, program_dot

__all__ = [
    "Cost",
    "Explanation",
    "Kind",
    "RegionUse",
    "Report",
    "StepUse",
    "TierState",
    "explain",
    "report",
]

IN_MEMORY, ON_DISK, TO_COMPILE, INTERPRETED = (
    "in memory",
    "on disk",
    "to be compiled",
    "interpreted",
)


@dataclass(frozen=True)
class StepUse:
    """One step: its layer, body and KV slot, which may be that of a step whose keys and values it
    reads; blends opened before and closed (dampings) after it; bytes of its weights.
    """

    index: int
    layer: int
    body: str
    slot: int
    opens: int
    closes: tuple[float, ...]
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class RegionUse:
    """A region, how often one call of a phase runs it, and whether it is there: in memory, on disk,
    to be compiled, or interpreted. `num_bytes` on disk, if it is there.
    """

    region: str
    shapes: str
    calls: int
    state: str
    num_bytes: int | None


@dataclass(frozen=True)
class Cost:
    """Bytes that one decode call of `batch` rows moves at least.

    `step_bytes` are the weights of all steps, a layer that runs twice counting twice (experts that
    are not chosen count as well); `end_bytes` those of prologue and epilogue, one row a token of
    tables by token id. Attention reads each row's slots whole (`kv_read_bytes`, all rows) and
    writes `kv_bytes_per_token` a row.
    """

    batch: int
    step_bytes: int
    end_bytes: int
    kv_bytes_per_token: int
    kv_read_bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.step_bytes + self.end_bytes

    @property
    def memory_bound_bytes(self) -> int:
        """Divided by the memory's bandwidth: the least time of a decoded token."""
        return self.weight_bytes + self.kv_read_bytes + self.batch * self.kv_bytes_per_token


@dataclass(frozen=True)
class TierState:
    """The whole form of the program for a phase: its record, if it ran, and whether it is in the
    artifact store.
    """

    phase: str
    record: TierRecord | None
    is_on_disk: bool


@dataclass(frozen=True)
class Explanation:
    """What one program would run.

    `segments` is None if its path has none; `kinds` are those of the whole model.
    """

    program: Program
    picture: str
    segments: tuple[dict[str, Any], ...] | None
    kinds: tuple[Kind, ...]
    steps: tuple[StepUse, ...]
    prefill: tuple[RegionUse, ...]
    decode: tuple[RegionUse, ...]
    is_traced: bool
    kv_length: int
    cost: Cost
    tier: str
    tiers: tuple[TierState, ...]

    @property
    def skipped(self) -> tuple[int, ...]:
        """Layers that never run."""
        return tuple(sorted(set(range(self.program.depth)) - set(self.program.path)))

    @property
    def missing(self) -> tuple[tuple[str, str], ...]:
        """Regions and shapes that the first call would have to compile."""
        return tuple(
            dict.fromkeys(
                (r.region, r.shapes) for r in (*self.prefill, *self.decode) if r.state == TO_COMPILE
            )
        )

    @property
    def would_trace(self) -> bool:
        """Whether the first call would trace the model."""
        return not self.is_traced and any(
            r.state in (TO_COMPILE, INTERPRETED) for r in (*self.prefill, *self.decode)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json` writes and reads back unchanged."""
        sums = {
            "weight_bytes": self.cost.weight_bytes,
            "memory_bound_bytes": self.cost.memory_bound_bytes,
        }
        more = {
            "num_steps": self.program.num_steps,
            "skipped": list(self.skipped),
            "would_trace": self.would_trace,
        }
        more["missing"] = [list(m) for m in self.missing]
        own = plain(self)
        return {**own, **more, "cost": {**own["cost"], **sums}}

    def text(self) -> str:
        """Tables for a terminal."""
        return "\n".join(_explanation_lines(self))

    def dot(self) -> str:
        """Graphviz source of the program's picture, for those who lay it out in another way."""
        return program_dot(self.program, **self._drawing())

    def _drawing(self) -> dict[str, Any]:
        """What both pictures say of layers, ends and costs."""
        kinds = {layer: kind.body for kind in self.kinds for layer in kind.layers}
        legend = {
            k.body: f"layers {ranges(k.layers)}, {size(k.weight_bytes)} each"
            for k in self.kinds
            if k.layers
        }
        start, head = (size(k.weight_bytes) for k in self.kinds if not k.layers)
        about = (
            f"{count(self.program.num_steps, 'step')}, {size(self.cost.weight_bytes)} of weights "
            f"a token, {size(self.cost.kv_bytes_per_token)} of KV"
        )
        of_layers = [kinds[layer] for layer in range(self.program.depth)]
        title = f"{self.program}\n{about}"
        return {"kinds": of_layers, "legend": legend, "ends": (start, head), "title": title}

    def svg(self, path: str | PathLike[str]) -> Path:
        """Draw the picture into a file. Raises InputError if that cannot be written."""
        return write_whole(program_svg(self.program, **self._drawing()).encode(), path)

    __str__ = text

    def _repr_html_(self) -> str:
        """The strip, and the tables without its text."""
        return self.program._repr_html_() + preformatted("\n".join(_table_lines(self)))


# ------------------------------------------------------------------------------------------ looking


def explain(runner: Runner, program: Program, *, batch: int = 1) -> Explanation:
    """What generating by `program` would run for `batch` rows.

    Raises InputError.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch must be a positive number of rows, got {batch!r}")
    library, regions, pool = runner.library, runner.regions, runner.pool
    batch = 1 if runner.deterministic else batch  # rows run one by one
    shape = ShapeClass.of(batch, min(runner.prefill_chunk, pool.max_length), pool.length)
    entries = {e.key: e for e in regions.store.entries()} if regions.store is not None else {}
    # of a prompt, its last chunk; a chunk of one token runs as if decoded
    parts = (runner.calls(program, of) for of in (shape, shape.decode))
    prefill, decode = (_uses(runner, Counter(calls), entries=entries) for calls in parts)
    steps, read = [], 0
    slots = library.table.slot_steps(program)
    for step in program.schedule():
        call, spec = library.layers[step.layer], library.table.kv_specs[step.layer]
        read += library.table.slot_spec(step.layer).bytes_per_token()
        steps.append(
            StepUse(
                step.index,
                step.layer,
                call.target,
                slots[step.index],
                step.opens,
                step.closes,
                tensor_bytes(call.weights),
                spec.bytes_per_token(),
            )
        )
    try:
        segments = tuple({**asdict(s), "op": str(s.op)} for s in program.segments())
    except NotSegmentableError:
        segments = None
    kv_bytes = sum(s.kv_bytes_per_token for s in steps)
    cost = Cost(
        batch,
        sum(s.weight_bytes for s in steps),
        _end_bytes(runner, batch),
        kv_bytes,
        batch * pool.length * read,
    )
    return Explanation(
        program,
        picture(program),
        segments,
        kinds_of(library),
        tuple(steps),
        prefill,
        decode,
        library.is_traced,
        pool.length,
        cost,
        runner.tiers.tier,
        _tiers(runner, program, shape=shape, entries=entries),
    )


def _uses(
    runner: Runner, calls: Counter[RegionName], *, entries: dict[str, Entry]
) -> tuple[RegionUse, ...]:
    regions, found = runner.regions, []
    if not runner.backend.needs_shapes:
        names: Counter[str] = Counter()
        for name, number in calls.items():
            names[name.graph] += number
        return tuple(
            RegionUse(graph, "any", number, INTERPRETED, None) for graph, number in names.items()
        )
    loaded = {(r.body, r.shapes): r.num_bytes for r in regions.records}
    for name, number in calls.items():
        place, num_bytes = (name.graph, str(name.shape)), None
        if place in loaded:
            state, num_bytes = IN_MEMORY, loaded[place] or None
        elif isinstance(runner.backend, PersistentBackend) and (
            entry := entries.get(regions.key(name).digest)
        ):
            state, num_bytes = ON_DISK, entry.num_bytes
        else:
            state = TO_COMPILE
        found.append(RegionUse(*place, number, state, num_bytes))
    return tuple(found)


def _tiers(
    runner: Runner, program: Program, *, shape: ShapeClass, entries: dict[str, Entry]
) -> tuple[TierState, ...]:
    """A state a phase, unless whole programs are off; they serve one row."""
    if runner.tiers.tier == "linked" or shape.batch != 1:
        return ()
    found = []
    records = {r.phase: replace(r) for r in runner.tiers.records if r.program == program}
    for phase, of in (("prefill", shape), ("decode", shape.decode)):
        found.append(
            TierState(phase, records.get(phase), runner.tiers.key(program, of).digest in entries)
        )
    return tuple(found)


def _end_bytes(runner: Runner, batch: int) -> int:
    """Bytes of prologue and epilogue that `batch` tokens read; of a table by token id, the tokens'
    rows.
    """
    start, head = runner.library.prologue, runner.library.epilogue
    read_whole, row_bytes = list(head.weights), 0
    for weight in start.weights:
        if weight.dim() > 1 and weight.shape[0] == runner.info.vocab_size:
            row_bytes += weight[0].nbytes
        else:
            read_whole.append(weight)
    return tensor_bytes(read_whole) + batch * row_bytes


# --------------------------------------------------------------------------------------------- text


def _explanation_lines(e: Explanation) -> Iterator[str]:
    yield from (e.picture, "")
    yield from _table_lines(e)


def _table_lines(e: Explanation) -> Iterator[str]:
    rows = [_step_row(group) for group in _groups(e.steps)]
    yield from table(
        ("steps", "layers", "graph", "KV slots", "blends", "weights"), rows, right=("weights",)
    )
    yield ""
    rows = [_use_row("prefill", use) for use in e.prefill]
    rows += [_use_row("decode", use) for use in e.decode]
    yield from table(
        ("call", "region", "shapes", "times", "state", "size"), rows, right=("times", "size")
    )
    if e.missing or e.would_trace:
        trace = "trace the model" if e.would_trace else ""
        regions = f"compile {count(len(e.missing), 'region')}" if e.missing else ""
        yield f"the first call will {' and '.join(filter(None, (trace, regions)))}"
    yield ""
    cost = e.cost
    yield (
        f"one decoded token{'' if cost.batch == 1 else f' of each of {cost.batch} rows'} moves "
        f"{size(cost.memory_bound_bytes)}:"
    )
    parts = f"{size(cost.step_bytes)} of the steps, {size(cost.end_bytes)} of prologue and epilogue"
    yield f"  weights  {size(cost.weight_bytes)}: {parts}"
    yield (
        f"  KV       {size(cost.kv_read_bytes)} read, {count(e.kv_length, 'token')} a row, and "
        f"{size(cost.kv_bytes_per_token)} written a row"
    )
    if not e.tiers:
        yield "tier 1   off: linked regions run " + (
            "this program" if e.tier == "linked" else "batches"
        )
    for tier in e.tiers:
        record = tier.record
        state = (
            f"{record.state}, {count(record.calls, 'call')}" if record else "cold, not called yet"
        )
        more = ", whole form on disk" if tier.is_on_disk else ""
        yield (
            f"tier 1   {tier.phase}: "
            f"{state}{more}{f' ({record.reason})' if record and record.reason else ''}"
        )


def _groups(steps: Sequence[StepUse]) -> Iterator[list[StepUse]]:
    """Steps over consecutive layers of one kind, cut where blends begin and end."""
    group: list[StepUse] = []
    for step in steps:
        last = group[-1] if group else None
        if last and (
            step.opens or last.closes or step.body != last.body or step.layer != last.layer + 1
        ):
            yield group
            group = []
        group.append(step)
    yield group


def _step_row(group: Sequence[StepUse]) -> tuple[str, ...]:
    blends = [f"opens {group[0].opens}"] if group[0].opens else []
    blends += [f"closes @{damping:g}" for damping in group[-1].closes]

    def numbers(name: str) -> str:
        return ranges(list(dict.fromkeys(getattr(step, name) for step in group)))

    return (
        numbers("index"),
        numbers("layer"),
        group[0].body,
        numbers("slot"),
        ", ".join(blends),
        size(sum(step.weight_bytes for step in group)),
    )


def _use_row(phase: str, use: RegionUse) -> tuple[str, ...]:
    num_bytes = "" if use.num_bytes is None else size(use.num_bytes)
    return phase, use.region, use.shapes, str(use.calls), use.state, num_bytes

"""Prefill and decode: compiled pieces, a session and tokens -> logits.

Shape legend: B batch, T tokens, V vocabulary, d hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, ShapeClass
from ..backends.base import RegionName
from ..capture.rotary import frequency_switch
from ..capture.support import without_autocast
from ..library import LayerLibrary
from ..program import Program
from .bound_weights import BoundWeights
from .cuda_graphs import CudaGraphs, cuda_graphs
from .group_session import GroupSession, groups_of
from .kv_cache import KvPool, KvSession, Resume
from .link import LinkedProgram, Linker, StepInputs
from .lockstep import Lockstep, Wants
from .lockstep_rows import RowBatch
from .lockstep_session import After, LockstepSession
from .model_info import ModelInfo
from .on_device import on_device
from .regions import RegionTable
from .tiers import Tier, TierPolicy, Tiers
from .token_rows import padded_count, padded_tokens, token_rows
from .uncopied import Uncopied

Session = KvSession | LockstepSession | GroupSession


class Runner(Uncopied):
    """Runs programs on tokens. A session of `open` takes the rows of a prompt by `prefill` and then
    a token a row by `decode`.

    Args:
        info, library, regions, pool: the model, its layers, their compiled code, the KV slots.
        prefill_chunk: prompt tokens that run at a time; more if the model's rotary frequencies
            depend on a row's length, so that the first part shows which a prompt takes.
        deterministic: run rows one by one, so that a row's logits have the same bits alone and in
            any batch.
        tiers: which form of a program runs one row.
        graphs: replays decodes and prompts on a GPU; None runs every kernel by itself.
        bound: tells whether a model still holds the weights that are read here; None where nobody
            can exchange them.
    """

    def __init__(
        self,
        info: ModelInfo,
        library: LayerLibrary,
        *,
        regions: RegionTable,
        pool: KvPool,
        prefill_chunk: int,
        deterministic: bool,
        tiers: Tiers,
        graphs: CudaGraphs | None,
        bound: BoundWeights | None,
    ) -> None:
        self.info, self.library, self.regions, self.pool = info, library, regions, pool
        switch = frequency_switch(info.config)
        # past so many tokens, all of a row is computed with other rotary frequencies
        self.switch = switch if switch is not None and switch < pool.max_length else None
        chunk = min(prefill_chunk, library.table.most_tokens)
        self.prefill_chunk = chunk if self.switch is None else max(chunk, self.switch + 1)
        self.deterministic, self.tiers = deterministic, tiers
        self.bound = bound
        self.lockstep = Lockstep(library, regions)
        # whether regions take keys and values by address; not if a row is computed by its length
        self.addresses = self.lockstep.possible and self.switch is None
        self.graphs = graphs
        self.linker = Linker(library, regions, pool=pool)

    @classmethod
    def of_model(
        cls,
        model: Any,
        regions: RegionTable,
        *,
        prefill_chunk: int = 512,
        deterministic: bool = False,
        tier: Tier = "linked",
        tier_policy: TierPolicy | None = None,
    ) -> "Runner":
        """A runner for a HuggingFace model, with a KV pool of its own, on the regions of its
        library.

        Raises InputError for a tier that these regions cannot have.
        """
        library = regions.library
        pool = KvPool(regions.max_length, library.device)
        policy = tier_policy or TierPolicy()
        tiers = Tiers(library, regions, kv_index=pool.kv_index, tier=tier, policy=policy)
        states, prompts = library.table.keeps_states, regions.backend.captures_prompts
        graphs = cuda_graphs(library.device, states=states, captures_prompts=prompts)
        return cls(
            ModelInfo.of(model),
            library,
            regions=regions,
            pool=pool,
            prefill_chunk=prefill_chunk,
            deterministic=deterministic,
            tiers=tiers,
            graphs=graphs,
            bound=BoundWeights(model, library.tensors),
        )

    @property
    def depth(self) -> int:
        return self.library.depth

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def dtype(self) -> torch.dtype:
        return self.library.dtype

    @property
    def max_length(self) -> int:
        """Tokens a row may hold, prompt and continuation."""
        return self.pool.max_length

    @property
    def backend(self) -> Backend:
        return self.regions.backend

    @property
    def graphs(self) -> CudaGraphs | None:
        """What replays passes, those of rows in lock-step included; None runs every kernel."""
        return self._graphs

    @graphs.setter
    def graphs(self, graphs: CudaGraphs | None) -> None:
        self._graphs = graphs
        self.lockstep.capture_in(None if graphs is None else graphs.cache)

    # --------------------------------------------------------------------------- sessions and rows

    @property
    def together(self) -> bool:
        """Whether rows run in lock-step, on keys and values by address; else they run in slots, as
        also where whole programs are compiled.
        """
        return self.addresses and self.tiers.tier == "linked"

    @property
    def uniform_in_slots(self) -> bool:
        """Whether rows of one program run in slots: where no rows run `together`, and on a GPU,
        whose attention reads slots as they are, but blocks only after copying them.
        """
        return not self.together or self.device.type == "cuda"

    @property
    def why_apart(self) -> str:
        """What is the case where rows do not run `together`, and what to use there."""
        return (
            f"rows do not run in lock-step here: backend {self.backend.name!r} on "
            f"{self.device}, tier {self.tiers.tier!r}, {self.info.architecture}; use generate(), "
            "or a model compiled with tier='linked' (docs/engine.md)"
        )

    def open(self, program: Program, batch: int) -> AbstractContextManager[Session]:
        """A context manager giving a session of `batch` empty rows of `program`.

        Raises WeightsReplacedError.
        """
        return self.open_rows([program] * batch)

    def open_slots(
        self, program: Program, batch: int, *, steps: slice = slice(None)
    ) -> AbstractContextManager[KvSession]:
        """A context manager giving an empty KvSession for `batch` rows of `program`, with slots for
        `steps` of it.

        Raises WeightsReplacedError.
        """
        self.check_weights()
        return self.pool.session(program, self.library.kv_specs(program)[steps], batch=batch)

    def check_weights(self) -> None:
        """Raise WeightsReplacedError if the model holds other tensors than are read here."""
        if self.bound is not None:
            self.bound.check()

    def open_together(self, programs: Sequence[Program]) -> LockstepSession:
        """A session of empty rows, one a program, which run in lock-step.

        Only where rows run `together`. Raises WeightsReplacedError.
        """
        self.check_weights()
        rows = RowBatch([self.lockstep.row(program) for program in programs])
        return LockstepSession(rows, self.max_length)

    def open_rows(self, programs: Sequence[Program]) -> AbstractContextManager[Session]:
        """A context manager giving a session of empty rows, one a program.

        Where rows do not run `together`, those of one program are a batch. Raises
        WeightsReplacedError.
        """
        uniform = len(set(programs)) == 1
        if self.together and not (uniform and self.uniform_in_slots):
            return self.open_together(programs)
        if uniform:
            return self.open_slots(programs[0], len(programs))
        opened = [
            (members, self.open_slots(program, len(members)))
            for program, members in groups_of(programs).items()
        ]
        return GroupSession(opened, self.max_length)

    def calls(self, program: Program, shape: ShapeClass) -> list[RegionName]:
        """The regions that one pass over rows of the program calls, in order; of a prompt in
        chunks, the last one.
        """
        if self.uniform_in_slots:
            return self.linker.calls(program, shape, every=shape == shape.decode)
        return self.lockstep.plans.calls(program, shape)

    def rows(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Validated input, on the CPU: the real tokens i64[T] of each row, and the boolean mask
        [B, T] that says where they stood.

        Raises InputError.
        """
        return token_rows(input_ids, attention_mask, vocab_size=self.info.vocab_size)

    def chunks(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
        """The rows' tokens in parts of at most `prefill_chunk`: ids i64[B, T], padding after a
        row's own, and its counts; T is a `padded_count`.
        """
        for start in range(0, max(len(r) for r in rows), self.prefill_chunk):
            parts = [r[start : start + self.prefill_chunk] for r in rows]
            counts = [len(p) for p in parts]
            tokens = padded_count(max(counts), self.device)
            yield padded_tokens(parts, rows, tokens=tokens).to(self.device), counts

    # ----------------------------------------------------------------------------- prefill, decode

    def prefill(
        self, session: Session, rows: Sequence[Tensor], *, every: bool = False
    ) -> list[Tensor]:
        """Append the rows' tokens i64[T] in chunks; per row, logits [V] of its last token, or
        [T, V] if `every`.

        In a session after a trunk, only the steps after it run. Raises KvOverflowError before
        anything runs.
        """
        session.require([len(r) for r in rows])
        if isinstance(session, GroupSession):
            return session.gather(
                lambda own, members: self.prefill(own, [rows[m] for m in members], every=every)
            )
        if isinstance(session, LockstepSession):
            return self._prefill_together(session, rows, every=every)
        crosses = self._crosses(session, [len(r) for r in rows])
        if (self.deterministic or crosses) and len(rows) > 1:
            each = [self.prefill(session.row(i), [r], every=every)[0] for i, r in enumerate(rows)]
            session.resume = None
            return each
        if crosses:
            held, before = session.lengths[0], session.restart()
            whole = self.prefill(session, [torch.cat((before, rows[0].to(before)))], every=every)
            return [whole[0][held:]] if every else whole
        resume = session.resume

        def run(ids: Tensor, counts: list[int], wants: Wants | None, start: int) -> Tensor | None:
            after = resume and resume.chunk(start, ids.shape[1])
            return self._run(session, ids, counts=counts, wants=wants, resume=after)

        found = self._in_chunks(rows, every, run=run)
        session.resume = None
        return found

    def _prefill_together(
        self, session: LockstepSession, rows: Sequence[Tensor], *, every: bool
    ) -> list[Tensor]:
        found: list[Tensor] = []
        for batch, members in self._batches(session):
            after = session.after and session.after.take(members)
            own = [rows[m] for m in members]
            found += self._prefill_batch(batch, own, every=every, after=after)
        session.after = None
        return found

    def _prefill_batch(
        self, batch: RowBatch, rows: Sequence[Tensor], *, every: bool, after: After | None
    ) -> list[Tensor]:
        def run(ids: Tensor, counts: list[int], wants: Wants | None, start: int) -> Tensor | None:
            part = after and after.chunk(start, ids.shape[1])
            with without_autocast(self.device):
                if wants is not None:
                    return self.lockstep.run(batch, ids, counts=counts, wants=wants, after=part)
                self.lockstep.write_kv(batch, ids, counts=counts, after=part)
                return None

        return self._in_chunks(rows, every, run=run)

    def _in_chunks(
        self,
        rows: Sequence[Tensor],
        every: bool,
        *,
        run: Callable[[Tensor, list[int], Wants | None, int], Tensor | None],
    ) -> list[Tensor]:
        """Logits of a prefill, each chunk of which `run` makes, from its first token on."""
        results: list[list[Tensor]] = [[] for _ in rows]
        start = 0
        for ids, counts in self.chunks(rows):
            stop = start + self.prefill_chunk
            ends = [n > 0 and stop >= len(r) for n, r in zip(counts, rows, strict=True)]
            logits = run(ids, counts, "every" if every else "last" if any(ends) else None, start)
            start = stop
            if logits is None:
                continue
            for own, result, count, is_end in zip(logits, results, counts, ends, strict=True):
                if every and count:
                    result.append(own[:count])
                elif is_end:
                    result.append(own[0])
        return [torch.cat(r) if every else r[0] for r in results]

    def hidden(
        self, session: LockstepSession, rows: Sequence[Tensor], *, num_steps: int
    ) -> list[Tensor]:
        """Append the rows' tokens i64[T], and run the first steps of their programs alone: hidden
        states [T, d] after them.
        """
        found: list[list[Tensor]] = [[] for _ in rows]
        for batch, members in self._batches(session):
            for ids, counts in self.chunks([rows[m] for m in members]):
                with without_autocast(self.device):
                    hidden = self.lockstep.run(
                        batch, ids, counts=counts, wants="hidden", stop=num_steps
                    )
                for own, count, m in zip(hidden, counts, members, strict=True):
                    found[m].append(own[:count])
        return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in found]

    def _batches(self, session: LockstepSession) -> Iterator[tuple[RowBatch, range]]:
        """The rows that run at a time: all of them, or each by itself."""
        if not self.deterministic:
            yield session.rows, range(session.batch)
            return
        for i in range(session.batch):
            yield session.single(i), range(i, i + 1)

    def decode(self, session: Session, tokens: Tensor) -> Tensor:
        """Append one token per row, `tokens` i64[B]; logits [B, V]."""
        tokens, batch = tokens.to(self.device), session.batch
        session.require([1] * batch)
        if isinstance(session, GroupSession):
            rows = session.gather(lambda own, members: self.decode(own, tokens[list(members)]))
            return torch.stack(rows)
        if isinstance(session, LockstepSession):
            logits = []
            with without_autocast(self.device):
                for part, members in self._batches(session):
                    ids = tokens[members.start : members.stop, None]
                    logits.append(self.lockstep.run(part, ids, counts=[1] * len(part))[:, 0])
            return logits[0] if len(logits) == 1 else torch.cat(logits)
        crosses = self._crosses(session, [1] * batch)
        if (self.deterministic or crosses) and batch > 1:
            each = [self.decode(session.row(i), tokens[i : i + 1]) for i in range(batch)]
            return torch.cat(each)
        if crosses:
            return torch.stack(self.prefill(session, [tokens]))
        logits = self._run(session, tokens[:, None], counts=[1] * batch, wants="every")
        assert logits is not None
        return logits[:, 0]

    def _crosses(self, session: KvSession, counts: Sequence[int]) -> bool:
        """Whether a row that holds tokens already goes past the length at which the model takes
        other rotary frequencies: it is then run anew, as the model itself would.
        """
        if self.switch is None:
            return False
        lengths = zip(session.lengths, counts, strict=True)
        return any(0 < held <= self.switch < held + count for held, count in lengths)

    def warm_up(self, programs: Iterable[Program], batch: int) -> None:
        """Compile what prefill and decode of these programs need for `batch` rows."""
        tokens = min(2, self.max_length)
        rows = [torch.zeros(tokens, dtype=torch.long)] * batch
        for program in programs:
            ways = [self.open(program, batch)]
            if self.together and self.uniform_in_slots:  # engines, conversations, mixed rows
                ways.append(self.open_together([program] * batch))
            for opened in ways:
                with opened as session:
                    self.prefill(session, rows)
                    if tokens < self.max_length:
                        self.decode(session, torch.zeros(batch, dtype=torch.long))

    @torch.no_grad()
    def _run(
        self,
        session: KvSession,
        ids: Tensor,
        *,
        counts: list[int],
        wants: Wants | None,
        resume: Resume | None = None,
    ) -> Tensor | None:
        """One pass over ids [B, T], of which each row has `counts`: logits [B, T, V].

        Of several tokens a row, the last one alone gets logits [B, 1, V], unless `wants` asks for
        every one; without it, only keys and values are written.
        """
        with without_autocast(self.device):
            batch, tokens = ids.shape
            positions = session.positions(counts, tokens)
            shape = ShapeClass.of(batch, tokens, self.pool.length)
            every, where = wants == "every" or tokens == 1, None
            if wants == "last" and not every:
                # of rows that go on, the last token of this part: it has the frequencies of its row
                where = on_device([max(0, count - 1) for count in counts], self.device)
            linked = self.linker.link(session.program, shape, every=every)
            if (switch := self.switch) is not None:
                held = zip(counts, session.lengths, strict=True)
                session.keep(ids, [n if before <= switch else 0 for n, before in held])
            # regions are compiled for dense operands
            inputs = StepInputs.of(
                session, ids.contiguous(), positions=positions, logits_at=where, resume=resume
            )
            logits = None
            if every or where is not None:
                logits = self._logits(linked, shape, inputs=inputs)
            else:  # the head would be computed for nothing
                linked.write_kv(inputs)
            session.advance(counts)
            return logits

    def _logits(self, linked: LinkedProgram, shape: ShapeClass, *, inputs: StepInputs) -> Tensor:
        """Logits by the form that is due: regions, a captured graph of them, a whole program."""
        if inputs.resume is not None:
            return linked.run(inputs)
        run = LinkedProgram.run if self.graphs is None else self.graphs.run
        if shape.batch == 1 and (shape.tokens == 1 or inputs.logits_at is not None):
            return self.tiers.run(linked, shape, inputs=inputs, run_linked=run)
        return run(linked, inputs)

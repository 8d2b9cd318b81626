"""`polar_fx.compile`: a HuggingFace causal LM -> a model that runs any program of its layers.

Shape legend: B batch, T tokens, V vocabulary.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .backends import Backend, ShapeClass, get_backend
from .capture import check_supported, embedding_weight
from .capture.checked import warn_if_not_finite
from .capture.support import without_autocast
from .errors import InputError
from .explain.program_report import Explanation, Report, explain, report
from .library import LayerLibrary
from .library.cached import load_library
from .predictor.menu import Menu
from .predictor.policy import Policy
from .predictor.saved import load_selector
from .program import Program
from .runtime.bound_weights import BoundWeights
from .runtime.code_key import RegionRecord
from .runtime.cuda_graphs import CudaApi, CudaGraphs
from .runtime.dispatcher import Dispatcher, DispatchReport, Predictor, Unprepared
from .runtime.generator import Generator
from .runtime.kv_cache import KvPool, KvSession
from .runtime.link import LinkedProgram, Linker
from .runtime.regions import RegionTable
from .runtime.tiers import Tier, TierPolicy, Tiers
from .runtime.token_rows import padded, token_rows
from .runtime.trunk import Trunk
from .store import ArtifactStore

_MAX_LENGTH = 1024  # tokens a row may hold unless the user says otherwise
_PREFILL_CHUNK, _GPU_PREFILL_CHUNK = 512, 4096  # a GPU needs many tokens at a time to be busy
_GPU_TOKENS = 64

ProgramLike = Program | str | Sequence[int] | None


def compile(
    model: PreTrainedModel | str | PathLike[str] | None = None,
    backend: str | Backend = "auto",
    *,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    deterministic: bool = False,
    program: ProgramLike = None,
    check: bool = True,
    cache: bool | ArtifactStore = True,
    workers: int | None = None,
    tier: Tier = "linked",
    tier_policy: TierPolicy | None = None,
    predictor: Predictor | str | PathLike[str] | None = None,
    menu: Menu | Iterable[ProgramLike] | None = None,
    policy: str | Policy | None = None,
    unprepared: Unprepared = "identity",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> "CompiledModel":
    """Capture `model` once and return it as a `CompiledModel`.

    Args:
        model: a causal LM, a local folder or a model id; None loads the embedded default. It is not
            changed, and its weights are shared, not copied.
        backend: "aot_inductor" compiles each distinct layer graph once per shape class, ahead of
            time, into files that later processes load; "inductor" compiles them in this process;
            "eager" interprets; "tensorrt" builds engines (docs/tensorrt.md). "auto" is
            "aot_inductor" on the CPU and "inductor" elsewhere.
        max_length: tokens a row may hold, prompt and continuation (default: the model's own limit,
            at most 1024).
        prefill_chunk: prompt tokens run at a time (default: 512 on the CPU, 4,096 on a GPU).
        deterministic: run rows one by one, so that a row's logits have the same bits alone and in
            any batch.
        program: what calls without `program=` run (default: identity).
        check: compare the captured graph with the model on a few tokens before returning it.
        cache: whether to keep captures and compiled artifacts on disk and use those that are there;
            or the store for them.
        workers: processes that compile at once (0: this one alone; default: as many as there are
            processors, at most 8).
        tier: "linked" calls one region a step; "whole" compiles every program that runs as one
            graph; "auto" does so for programs that turn out hot, in the background, and keeps what
            is measured to be faster.
        tier_policy: when "auto" compiles and what it keeps.
        predictor: proposes programs for each input (a predictor, or the folder `train` made);
            `generate` without `program=` is then dispatched, `forward` is not. Nothing is prepared
            before `warmup()`: until then inputs run the identity.
        menu: the programs that may run (default: the predictor's).
        policy: how one is chosen: "identity", "accuracy", "steps<=0.9", "mean_steps<=0.9",
            "latency_ms<=30" or a program (default: the one saved with the predictor, else
            "accuracy").
        device, dtype: where and in what type to load a model that is named, as `polar_fx.load`
            takes them (default: on the CPU in float32). A model that is loaded already runs where
            and as it is.
        unprepared: what runs in place of a program that is not prepared: "identity", or the program
            all the same ("link").

    Raises UnsupportedModelError, CaptureError, UnknownBackendError, InputError; CompileError for a
    backend that cannot run here.
    """
    if program is not None and not (predictor is menu is policy is None):
        raise InputError(
            "compile takes either program=, which all calls run, or predictor=, menu= and "
            "policy=; leave one out"
        )
    get_backend(backend)  # refuse an unknown one before anything is loaded
    from .models import check_row_length, load, longest_row

    if model is None or isinstance(model, (str, PathLike)):
        model, _ = load(model, torch.float32 if dtype is None else dtype, device)
    elif device is not None or dtype is not None:
        raise InputError(
            f"device={device!r} and dtype={dtype!r} are for models that are named; this one is "
            "loaded already: move it (model.to(...)) before it is compiled, and leave both out"
        )
    check_supported(model)
    if max_length is None:
        max_length = longest_row(model, _MAX_LENGTH)
    if prefill_chunk is None:
        prefill_chunk = (
            _GPU_PREFILL_CHUNK if embedding_weight(model).device.type == "cuda" else _PREFILL_CHUNK
        )
    for name, value in (("max_length", max_length), ("prefill_chunk", prefill_chunk)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive number of tokens, got {value!r}")
    check_row_length(model, max_length)
    if deterministic and tier == "auto":
        raise InputError(
            "deterministic=True needs tier='linked' or 'whole': 'auto' changes over from one form "
            "to another"
        )
    warn_if_not_finite(model)
    store = cache if isinstance(cache, ArtifactStore) else ArtifactStore() if cache else None
    library = load_library(model, check, store)
    chosen = get_backend(backend, library.device)
    compiled = CompiledModel(
        model,
        library,
        chosen,
        max_length,
        prefill_chunk,
        deterministic,
        program,
        store,
        workers,
        tier,
        tier_policy,
    )
    if predictor is not None or menu is not None or policy is not None:
        compiled.dispatch_by(predictor, menu, policy, unprepared)
    return compiled


class CompiledModel:
    """A captured model that runs a program of layers on every call.

    `library` holds graphs and weights, `linker` compiled regions and linked programs, `pool` the KV
    slots.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        library: LayerLibrary,
        backend: Backend,
        max_length: int,
        prefill_chunk: int,
        deterministic: bool,
        program: ProgramLike,
        store: ArtifactStore | None = None,
        workers: int | None = None,
        tier: Tier = "linked",
        tier_policy: TierPolicy | None = None,
    ) -> None:
        self.config, self.generation_config = model.config, model.generation_config
        self.library, self.backend = library, backend
        self.bound = BoundWeights(model, library.tensors)
        self.prefill_chunk, self.deterministic = prefill_chunk, deterministic
        self.pool = KvPool(max_length, library.device)
        self.regions = RegionTable(library, backend, max_length, store, workers)
        self.linker = Linker(library, self.regions, self.pool)
        self.graphs = CudaGraphs(CudaApi(library.device)) if library.device.type == "cuda" else None
        self.tiers = Tiers(
            library, self.regions, self.pool.kv_index, tier, tier_policy or TierPolicy()
        )
        self.vocab_size = embedding_weight(model).shape[0]
        self.default_program = Program.identity(library.depth)
        self.default_program = self.resolve(program)
        self.generator = Generator(self)
        self.dispatcher: Dispatcher | None = None

    # ----------------------------------------------------------------------------------- properties

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return (self.config.architectures or [type(self.config).__name__])[0]

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
    def compilations(self) -> tuple[RegionRecord, ...]:
        """Every region compiled in this process so far; those loaded from the artifact store are
        not among them.
        """
        return tuple(r for r in self.regions.records if r.source == "compiled")

    def __repr__(self) -> str:
        return (
            f"CompiledModel({type(self.config).__name__}, depth={self.depth}, "
            f"backend={self.backend.name!r}, max_length={self.pool.max_length}, "
            f"{len(self.compilations)} regions compiled)"
        )

    def resolve(self, program: ProgramLike) -> Program:
        """A Program from a Program, its text or a path; None is the default.

        Raises ProgramError.
        """
        if program is None:
            return self.default_program
        if isinstance(program, str):
            return Program.parse(program, self.depth)
        if not isinstance(program, Program):
            program = Program.from_path(tuple(program), self.depth)
        self.library.check(program)
        return program

    # ---------------------------------------------------------------------------------------- calls

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, program: ProgramLike = None
    ) -> Tensor:
        """Logits [B, T, V] of every token under `program`.

        `input_ids` i64[B, T]; `attention_mask` [B, T] is 1 at real tokens, which may be padded on
        either side; logits of padding are 0. Raises InputError, ProgramError, KvOverflowError.
        """
        chosen = self.resolve(program)
        rows, mask = self.rows(input_ids, attention_mask)
        with self.session(chosen, len(rows)) as session:
            logits = self.prefill(chosen, session, rows, every=True)
        if bool(mask.all()):
            return torch.stack(logits)
        result = logits[0].new_zeros(*mask.shape, logits[0].shape[-1])
        result[mask.to(result.device)] = torch.cat(logits)
        return result

    __call__ = forward

    def generate(self, input_ids: Tensor, *, program: ProgramLike = None, **kwargs: Any) -> Any:
        """transformers' `generate` on `program`: greedy, sampling, beams, stop tokens and strings,
        streamers.

        Takes its usual arguments, a `generation_config` included, and returns what it returns:
        i64[B, T + new] unless asked for more. Prompts may be padded on either side
        (`attention_mask`). With a dispatcher and no `program`, each row runs the program chosen for
        it. Raises InputError, ProgramError, and KvOverflowError before anything runs.
        """
        if program is None and self.dispatcher is not None:
            return self.dispatcher.generate(input_ids, **kwargs)[0]
        return self.generator.run(input_ids, self.resolve(program), **kwargs)

    def dispatch(self, input_ids: Tensor, **kwargs: Any) -> tuple[Any, DispatchReport]:
        """`generate`, and what each row ran, why, and how long that took.

        Raises InputError without a dispatcher.
        """
        if self.dispatcher is None:
            raise InputError(
                "nothing is dispatched here; compile with predictor=, menu= or policy=, or call "
                "dispatch_by()"
            )
        return self.dispatcher.generate(input_ids, **kwargs)

    def dispatch_by(
        self,
        predictor: Predictor | str | PathLike[str] | None = None,
        menu: Menu | Iterable[ProgramLike] | None = None,
        policy: str | Policy | None = None,
        unprepared: Unprepared = "identity",
    ) -> Dispatcher:
        """Dispatch `generate` without `program=` from now on; arguments as `compile` takes them.

        Raises InputError for a predictor of another model, and ProgramError for a program that does
        not share its first steps.
        """
        if isinstance(predictor, (str, PathLike)):
            predictor, saved = load_selector(Path(predictor), self.library.model_fingerprint)
            policy = saved if policy is None else policy
        if menu is not None and not isinstance(menu, Menu):
            menu = Menu.of([self.resolve(program) for program in menu], self.depth)
        self.dispatcher = Dispatcher(
            self, predictor, menu, "accuracy" if policy is None else policy, unprepared
        )
        return self.dispatcher

    def warmup(
        self, programs: Iterable[ProgramLike] | None = None, batch: int | None = None
    ) -> tuple[RegionRecord, ...]:
        """Compile what prefill and decode of these programs need at this batch size; returns the
        new regions.

        By default the default program for one row; with a dispatcher its whole menu, for one row
        and for several.
        """
        before = len(self.regions.records)
        if programs is None and self.dispatcher is not None:
            self.dispatcher.warmup((1, 2) if batch is None else (batch,))
        else:
            self._warm_up((None,) if programs is None else programs, batch or 1)
        return tuple(r for r in self.regions.records[before:] if r.source == "compiled")

    def _warm_up(self, programs: Iterable[ProgramLike], batch: int) -> None:
        tokens = min(2, self.pool.max_length)
        for program in programs:
            chosen = self.resolve(program)
            rows = [torch.zeros(tokens, dtype=torch.long)] * batch
            with self.session(chosen, batch) as session:
                self.prefill(chosen, session, rows)
                if tokens < self.pool.max_length:
                    self.decode(chosen, session, torch.zeros(batch, dtype=torch.long))

    def explain(self, program: ProgramLike = None, batch: int = 1) -> Explanation:
        """What generating by `program` would run for `batch` rows; compiles nothing.

        Raises ProgramError, InputError.
        """
        return explain(self, program, batch)

    def report(self) -> Report:
        """What was captured, compiled or loaded so far, and what it holds; compiles nothing."""
        return report(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "a compiled model cannot be copied or pickled: it holds compiled code, locks and KV "
            "memory; compile the model again where it is wanted (from the artifact store that "
            "takes seconds), or export a bundle (polar_fx.export)"
        )

    # ------------------------------------------------------------ prefill and decode of one session

    def session(self, program: Program, batch: int) -> Any:
        """A context manager giving an empty KvSession for `batch` rows of `program`.

        Raises WeightsReplacedError.
        """
        self.bound.check()
        return self.pool.session(self.library.kv_specs(program), batch)

    def rows(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Validated input, on the CPU: the real tokens of each row, and the boolean mask [B, T]
        that says where they stood.
        """
        return token_rows(input_ids, attention_mask, self.vocab_size)

    def chunks(self, rows: list[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
        """The rows' tokens in parts of at most `prefill_chunk`: ids i64[B, T], zeros after a row's
        own, and its counts.

        On a GPU, T of several tokens is a multiple of 64: its attention library makes a plan for
        each new size.
        """
        for start in range(0, max(len(r) for r in rows), self.prefill_chunk):
            parts = [r[start : start + self.prefill_chunk] for r in rows]
            counts = [len(p) for p in parts]
            tokens = max(counts)
            if self.device.type == "cuda" and tokens > 1:
                tokens += -tokens % _GPU_TOKENS
            yield padded(parts, tokens).to(self.device), counts

    def prefill(
        self,
        program: Program,
        session: KvSession,
        rows: list[Tensor],
        every: bool = False,
        trunk: Trunk | None = None,
    ) -> list[Tensor]:
        """Append the rows' tokens in chunks; per row, logits [V] of its last token, or [T, V] if
        `every`.

        After a `trunk` of the same rows, and in a session of `session_after`, only the steps behind
        it run.
        """
        session.require([len(r) for r in rows])
        if self.deterministic and len(rows) > 1:
            each = [None if trunk is None else trunk.take([i]) for i in range(len(rows))]
            return [
                self.prefill(program, session.row(i), [r], every, each[i])[0]
                for i, r in enumerate(rows)
            ]
        results: list[list[Tensor]] = [[] for _ in rows]
        for i, (ids, counts) in enumerate(self.chunks(rows)):
            start = i * self.prefill_chunk
            last = [
                n - 1 if start + n == len(r) and n else -1
                for n, r in zip(counts, rows, strict=True)
            ]
            done = None
            if trunk is not None:
                states = [h[start : start + n] for h, n in zip(trunk.hidden, counts, strict=True)]
                done = trunk.num_steps, padded(states, ids.shape[1])
            logits = self._run(program, session, ids, counts, None if every else last, done)
            for i, (n, at) in enumerate(zip(counts, last, strict=True)):
                if every and n:
                    results[i].append(logits[i, :n])  # type: ignore[index]
                elif at >= 0:
                    results[i].append(logits[i, 0])  # type: ignore[index]
        return [torch.cat(r) if every else r[0] for r in results]

    def decode(self, program: Program, session: KvSession, tokens: Tensor) -> Tensor:
        """Append one token per row, `tokens` i64[B]; logits [B, V]."""
        ids = tokens.to(self.device)[:, None]
        if self.deterministic and session.batch > 1:
            session.require([1] * session.batch)
            one = [
                self._run(program, session.row(i), ids[i : i + 1], [1], [0])
                for i in range(session.batch)
            ]
            return torch.cat(one)[:, 0]  # type: ignore[arg-type]
        return self._run(program, session, ids, [1] * session.batch, [0] * session.batch)[:, 0]  # type: ignore[index]

    @torch.no_grad()
    def _run(
        self,
        program: Program,
        session: KvSession,
        ids: Tensor,
        counts: list[int],
        select: list[int] | None,
        done: tuple[int, Tensor] | None = None,
    ) -> Tensor | None:
        with without_autocast(self.device):
            return self._pass(program, session, ids, counts, select, done)

    def _pass(
        self,
        program: Program,
        session: KvSession,
        ids: Tensor,
        counts: list[int],
        select: list[int] | None,
        done: tuple[int, Tensor] | None,
    ) -> Tensor | None:
        """One pass over ids [B, T]: logits [B, T, V], or of one position per row [B, 1, V] if
        `select` names any.

        `done`: how many steps have run already, and the hidden states [B, T, d] after them.
        """
        batch, tokens = ids.shape
        positions = session.positions(counts, tokens)
        ids = ids.contiguous()  # regions are compiled for dense operands
        shape = ShapeClass.of(batch, tokens, self.pool.length)
        slots, where = session.slots, None
        if select is None or tokens == 1:
            linked = self.linker.link(program, shape)
            if done is not None:
                run = functools.partial(linked.run, ids, positions, slots, *done)
            else:
                decode = LinkedProgram.run if self.graphs is None or tokens > 1 else self.graphs.run
                run = functools.partial(decode, linked, ids, positions, slots)
        else:
            # else no row ends in this chunk: the head would be computed for nothing
            if max(select) >= 0:
                where = self.pool.on_device([max(0, s) for s in select])
            linked = self.linker.link(program, shape, every=False)
            run = functools.partial(linked.run_last, ids, positions, slots, where, *(done or ()))
        one = batch == 1 and (where is not None or tokens == 1) and done is None
        logits = self.tiers.run(program, shape, ids, positions, where, slots, run) if one else run()
        session.advance(counts)
        return logits

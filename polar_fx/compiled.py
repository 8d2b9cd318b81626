"""`polar_fx.compile`: a HuggingFace causal LM -> a model that runs any program of its layers.

Shape legend: B batch, T tokens, V vocabulary.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .backends import Backend, get_backend
from .capture import check_supported
from .capture.checked import warn_if_not_finite
from .engine import Engine, EngineSettings
from .errors import InputError
from .explain.program_report import Explanation, Report, explain, report
from .library import LayerLibrary
from .library.cached import load_library
from .predictor.menu import Menu
from .predictor.policy import Policy
from .predictor.shipped import SavedPredictor, load_named, trained_on
from .program import Program
from .quantized import Quantize
from .runtime.as_transformers import AsTransformers
from .runtime.bound_weights import BoundWeights
from .runtime.checked_runs import check_runs
from .runtime.code_key import RegionRecord
from .runtime.conversation import Conversation
from .runtime.cuda_graphs import CudaGraphs
from .runtime.dispatcher import Dispatcher, DispatchReport, Predictor, Unprepared
from .runtime.generator import Generator
from .runtime.kv_cache import KvPool
from .runtime.link import Linker
from .runtime.regions import RegionTable
from .runtime.row_length import default_row_length
from .runtime.runner import Runner, Session
from .runtime.tiers import Tier, TierPolicy, Tiers
from .runtime.uncopied import Uncopied
from .store import ArtifactStore

ProgramLike = Program | str | Sequence[int] | None
# one for all rows of a batch, or a list of one for each
ProgramsLike = ProgramLike | Sequence[ProgramLike]


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
    predictor: Predictor | SavedPredictor | str | PathLike[str] | None = None,
    menu: Menu | Iterable[ProgramLike] | None = None,
    policy: str | Policy | None = None,
    unprepared: Unprepared = "identity",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: Quantize | None = None,
) -> "CompiledModel":
    """Capture `model` once and return it as a `CompiledModel`.

    Args:
        model: a causal LM, a local folder or a model id; None loads the embedded default. Its
            weights are shared; on the CPU they move in memory: nothing else may run it meanwhile.
        backend: "aot_inductor" compiles each distinct layer graph once per shape class, ahead of
            time, into files that later processes load; "inductor" compiles them in this process;
            "eager" interprets; "tensorrt" builds engines (docs/tensorrt.md). "auto" is
            "aot_inductor" on the CPU and "inductor" elsewhere.
        max_length: tokens a row may hold, prompt and continuation (default: the model's own limit;
            at most 1,024 where keys and values lie in slots, see docs/engine.md).
        prefill_chunk: prompt tokens run at a time (default: 512 on the CPU, 4,096 on a GPU).
        deterministic: run rows one by one: a row's logits then have the same bits in any batch.
        program: what calls without `program=` run (default: identity).
        check: compare the captured graph, and how it runs, with the model on a few tokens first.
        cache: whether to keep captures and compiled artifacts on disk and use those that are there;
            or the store for them.
        workers: processes that compile at once (0: this one alone; default: as many as there are
            processors, at most 8).
        tier: "linked" calls one region a step; "whole" compiles every program that runs as one
            graph; "auto" does so for programs that turn out hot, in the background, and keeps what
            is measured to be faster.
        tier_policy: when "auto" compiles and what it keeps.
        predictor: proposes programs for each input (a predictor, the folder `train` made, or
            "default" for the one that comes with the embedded default model in bfloat16);
            `generate` without `program=` is then dispatched, `forward` is not. Nothing is prepared
            before `warmup()`: until then inputs run the identity.
        menu: the programs that may run (default: the predictor's).
        policy: how one is chosen: "identity", "accuracy", "steps<=0.9", "mean_steps<=0.9",
            "latency_ms<=30" or a program (default: the one saved with the predictor, else
            "accuracy").
        device: where to load a model that is named, as `polar_fx.load` takes it (default: CPU).
        dtype: in what type (default: float32). A model that is loaded runs where and as it is.
        quantize: "int8" or "int4" to hold the weights of a model that is named as integers.
        unprepared: what runs for a program that is not prepared: "identity", or it itself ("link").

    Raises UnsupportedModelError, CaptureError, UnknownBackendError, InputError; CompileError for a
    backend that cannot run here.
    """
    if program is not None and not (predictor is menu is policy is None):
        raise InputError(
            "compile takes either program=, which all calls run, or predictor=, menu= and "
            "policy=; leave one out"
        )
    get_backend(backend)  # refuse an unknown one before anything is loaded
    from .models import named_or_loaded, token_limits

    dtype, quantize = trained_on(predictor, model).unless(dtype, quantize)
    model = named_or_loaded(model, dtype, device=device, quantize=quantize)
    check_supported(model)
    max_length, prefill_chunk = token_limits(model, max_length, prefill_chunk=prefill_chunk)
    if deterministic and tier == "auto":
        raise InputError(
            "deterministic=True needs tier='linked' or 'whole': 'auto' changes over from one form "
            "to another"
        )
    warn_if_not_finite(model)
    store = cache if isinstance(cache, ArtifactStore) else ArtifactStore() if cache else None
    examine = functools.partial(check_runs, model, max_length=max_length) if check else None
    library = load_library(model, check, store=store, examine=examine)
    code = get_backend(backend, library.device)
    max_length = max_length or default_row_length(model, library, backend=code, tier=tier)
    regions = RegionTable(library, code, max_length=max_length, store=store, workers=workers)
    runner = Runner.of_model(
        model,
        regions,
        prefill_chunk=prefill_chunk,
        deterministic=deterministic,
        tier=tier,
        tier_policy=tier_policy,
    )
    compiled = CompiledModel(runner, program)
    if predictor is not None or menu is not None or policy is not None:
        compiled.dispatch_by(predictor, menu, policy, unprepared)
    return compiled


class CompiledModel(Uncopied, AsTransformers):
    """A captured model that runs a program of layers on every call.

    `runner` runs programs: `library` holds graphs and weights, `linker` compiled regions and linked
    programs, `pool` the KV slots. `default_program` is what calls without `program=` run, and
    `dispatcher`, if there is one, chooses instead of it in `generate`.
    """

    def __init__(self, runner: Runner, program: ProgramLike = None) -> None:
        self.runner, self.generator = runner, Generator(runner)
        self.default_program = Program.identity(runner.depth)
        self.default_program = self.resolve(program)
        self.dispatcher: Dispatcher | None = None

    # ----------------------------------------------------------------------------------- properties

    @property
    def config(self) -> Any:
        """HuggingFace's configuration of the model."""
        return self.runner.info.config

    @property
    def generation_config(self) -> Any:
        """Settings that `generate` runs by where a call gives none."""
        return self.runner.info.generation_config

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        self.runner.info = replace(self.runner.info, generation_config=settings)

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return self.runner.info.vocab_size

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return self.runner.info.architecture

    @property
    def depth(self) -> int:
        return self.runner.depth

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.dtype

    @property
    def library(self) -> LayerLibrary:
        return self.runner.library

    @property
    def backend(self) -> Backend:
        return self.runner.backend

    @property
    def regions(self) -> RegionTable:
        return self.runner.regions

    @property
    def linker(self) -> Linker:
        return self.runner.linker

    @property
    def pool(self) -> KvPool:
        return self.runner.pool

    @property
    def tiers(self) -> Tiers:
        return self.runner.tiers

    @property
    def graphs(self) -> CudaGraphs | None:
        """Captured decodes; None launches every kernel by itself."""
        return self.runner.graphs

    @graphs.setter
    def graphs(self, graphs: CudaGraphs | None) -> None:
        self.runner.graphs = graphs

    @property
    def bound(self) -> BoundWeights | None:
        """Whether the model still holds the weights that run here; None without a model."""
        return self.runner.bound

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens that run at a time."""
        return self.runner.prefill_chunk

    @property
    def deterministic(self) -> bool:
        """Whether rows run one by one."""
        return self.runner.deterministic

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
            program = Program.parse(program, self.depth)
        elif not isinstance(program, Program):
            program = Program.from_path(program, self.depth)
        self.library.check(program)
        return program

    def _of_rows(self, program: ProgramsLike, batch: int) -> list[Program]:
        """The program of each row; a list of layers is a path, and so one program for all."""
        several: list[Any] = list(program) if isinstance(program, (list, tuple)) else []
        if all(isinstance(p, int) for p in several):
            one: Any = program
            return [self.resolve(one)] * batch
        if len(several) != batch:
            raise InputError(
                f"{len(several)} programs were given for {batch} rows; give one for each row, or "
                "one for all"
            )
        return [self.resolve(p) for p in several]

    # ---------------------------------------------------------------------------------------- calls

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, program: ProgramsLike = None
    ) -> Tensor:
        """Logits [B, T, V] of every token under `program`, or under a list of one for each row.

        `input_ids` i64[B, T]; `attention_mask` [B, T] is 1 at real tokens, which may be padded on
        either side; logits of padding are 0. Raises InputError, ProgramError, KvOverflowError.
        """
        rows, mask = self.runner.rows(input_ids, attention_mask)
        with self.runner.open_rows(self._of_rows(program, len(rows))) as session:
            logits = self.runner.prefill(session, rows, every=True)
        if bool(mask.all()):
            return torch.stack(logits)
        result = logits[0].new_zeros(*mask.shape, logits[0].shape[-1])
        result[mask.to(result.device)] = torch.cat(logits)
        return result

    def generate(
        self, input_ids: Tensor | None = None, *, program: ProgramsLike = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate` on `program`: greedy, sampling, beams, stop tokens and strings,
        streamers.

        Takes its usual arguments, `inputs` and a `generation_config` included, and returns what it
        returns: i64[B, T + new] unless asked for more. Prompts may be padded on either side
        (`attention_mask`). A list of programs gives one to each row: they run together (see
        docs/engine.md). With a dispatcher and no `program`, each row runs the program chosen for
        it. Raises InputError, ProgramError, and KvOverflowError before anything runs.
        """
        ids: Any = kwargs.pop("inputs", None) if input_ids is None else input_ids
        if program is None and self.dispatcher is not None:
            return self.dispatcher.generate(ids, **kwargs)[0]
        call = self.generator.check(ids, **kwargs)
        return self.generator.run(call, self._of_rows(program, len(call.rows)))

    def start(self, program: ProgramLike = None) -> Conversation:
        """An empty conversation, whose keys and values stay between calls (docs/engine.md).

        Raises ProgramError, and InputError where rows do not run in lock-step.
        """
        return Conversation(self.generator, self.resolve(program))

    def engine(self, *, tokenizer: Any = None, **settings: int) -> Engine:
        """An engine that serves requests as they come, each on a program of its own or on the one
        that the dispatcher chooses (docs/engine.md); `settings` are those of `EngineSettings`.
        """
        return Engine(
            self.runner,
            default_program=self.default_program,
            dispatcher=self.dispatcher,
            tokenizer=tokenizer,
            settings=EngineSettings(**settings),
        )

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
        predictor: Predictor | SavedPredictor | str | PathLike[str] | None = None,
        menu: Menu | Iterable[ProgramLike] | None = None,
        policy: str | Policy | None = None,
        unprepared: Unprepared = "identity",
    ) -> Dispatcher:
        """Dispatch `generate` without `program=` from now on; arguments as `compile` takes them.

        Raises InputError for a predictor of another model, and ProgramError for a program that does
        not share its first steps.
        """
        if isinstance(predictor, (str, PathLike, SavedPredictor)):
            predictor, saved = load_named(predictor, self.library)
            policy = saved if policy is None else policy
        if menu is not None and not isinstance(menu, Menu):
            menu = Menu.of([self.resolve(program) for program in menu], self.depth)
        self.dispatcher = Dispatcher(
            self.runner,
            predictor,
            menu=menu,
            policy="accuracy" if policy is None else policy,
            unprepared=unprepared,
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
            wanted = (None,) if programs is None else programs
            self.runner.warm_up((self.resolve(program) for program in wanted), batch or 1)
        return tuple(r for r in self.regions.records[before:] if r.source == "compiled")

    def explain(self, program: ProgramLike = None, batch: int = 1) -> Explanation:
        """What generating by `program` would run for `batch` rows; compiles nothing.

        Raises ProgramError, InputError.
        """
        return explain(self.runner, self.resolve(program), batch=batch)

    def report(self) -> Report:
        """What was captured, compiled or loaded so far, and what it holds; compiles nothing."""
        return report(self.runner)

    # ------------------------------------------------------------ prefill and decode of one session

    def session(self, program: Program, batch: int) -> AbstractContextManager[Session]:
        """A context manager giving an empty session for `batch` rows of `program`.

        Raises WeightsReplacedError.
        """
        return self.runner.open(program, batch)

    def rows(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Validated input, as `Runner.rows` has it."""
        return self.runner.rows(input_ids, attention_mask)

    def chunks(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
        """The rows' tokens in parts, as `Runner.chunks` has them."""
        return self.runner.chunks(rows)

    def prefill(
        self, program: Program, session: Session, rows: Sequence[Tensor], every: bool = False
    ) -> list[Tensor]:
        """Append the rows' tokens i64[T]; per row, logits [V] of its last token, or [T, V] if
        `every`.

        Raises ProgramError for a session of another program, and KvOverflowError before anything
        runs.
        """
        session.require_program(program)
        return self.runner.prefill(session, rows, every=every)

    def decode(self, program: Program, session: Session, tokens: Tensor) -> Tensor:
        """Append one token per row, `tokens` i64[B]; logits [B, V].

        Raises as `prefill` does.
        """
        session.require_program(program)
        return self.runner.decode(session, tokens)

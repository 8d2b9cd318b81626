"""A bundle -> a model that runs its programs: no modeling code, no tracing, no compiler.

The parts are those of `polar_fx.compile`: a library by its symbol table, and a runner over a
table of regions and a KV pool. Only what they are given differs: tensors from the weights file, and
regions that are loaded or refused, never made.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from ..backends import AotInductorBackend, PersistentBackend, Region
from ..backends.aot_inductor import REGION
from ..backends.base import RegionName
from ..compiled import CompiledModel, ProgramLike
from ..errors import InputError, ProgramError
from ..huge_pages import hold_in_huge_pages
from ..library import LayerLibrary
from ..library.symbols import SymbolTable
from ..output.plain_text import count, first_line
from ..predictor.policy import Policy
from ..predictor.saved import load_selector
from ..program import Program
from ..runtime.code_key import target_of
from ..runtime.cuda_graphs import cuda_graphs
from ..runtime.dispatcher import Dispatcher
from ..runtime.kv_cache import KvPool
from ..runtime.model_info import ModelInfo
from ..runtime.regions import RegionTable
from ..runtime.runner import Runner
from ..runtime.tiers import TierPolicy, Tiers
from .contents import check_regions, read_table
from .errors import BundleError
from .files import verified
from .hub import BundleOnTheHub
from .manifest import (
    CONFIG,
    GENERATION,
    MANIFEST,
    PREDICTOR,
    PREDICTOR_FILES,
    SYMBOLS,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    read_manifest,
)
from .settings import read_config, read_generation
from .weights import check_weights, load_weights

_ELSEWHERE = "export the bundle on a machine like this one, or load it where it was made for"


def verify_bundle(
    folder: str | PathLike[str], *, fingerprint: str | None = None, target: bool = True
) -> Manifest:
    """Check every file of a bundle, and that it fits this machine unless `target` is False; loads
    and runs nothing.

    `fingerprint` is the `Manifest.fingerprint` that is expected, if it is known from elsewhere.
    Raises BundleError.
    """
    place = Path(folder).resolve()
    contents = _verified(place, fingerprint, target=target)
    check_weights(place, contents.manifest, table=contents.table)
    return contents.manifest


def load_bundle(
    folder: str | PathLike[str], *, any_program: bool = False, fingerprint: str | None = None
) -> "BundledModel":
    """The model of a bundle, ready to run: every region is loaded, nothing is traced or compiled,
    now or later.

    Args:
        folder: what `export` wrote. A bundle holds compiled code: load those you trust.
        any_program: run any program of the layers, not only those that the manifest names.
        fingerprint: the `Manifest.fingerprint` that the bundle must have, noted when it was
            exported.

    Raises BundleError before anything of a bundle that is not whole, or is not for this machine, is
    loaded.
    """
    place = Path(folder).resolve()
    with tempfile.TemporaryDirectory(prefix="polar_fx-") as packages:
        contents = _verified(place, fingerprint, target=True, packages=Path(packages))
        weights = load_weights(place, contents.manifest, table=contents.table)
        own = {id(t): t for t in weights.values()}  # shared ones are there once, and stay shared
        if contents.manifest.device == "cpu":
            hold_in_huge_pages(own.values())
        else:
            moved = {key: t.to(contents.manifest.device) for key, t in own.items()}
            weights = {name: moved[id(t)] for name, t in weights.items()}
        return BundledModel(
            place, contents, weights=weights, packages=Path(packages), any_program=any_program
        )


@dataclass(frozen=True)
class _Contents:
    """What a bundle says, all of it checked."""

    manifest: Manifest
    table: SymbolTable
    config: PreTrainedConfig
    generation_config: GenerationConfig


def _verified(
    place: Path, fingerprint: str | None, *, target: bool, packages: Path | None = None
) -> _Contents:
    """All checks but that of the weights, from the cheapest to the ones that read everything.

    Regions are copied to `packages`, if that is given: what is opened there is what was hashed,
    whoever can write to the bundle.
    """
    manifest = read_manifest(place)
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise BundleError(
            place,
            f"has fingerprint {manifest.fingerprint}, not {fingerprint}",
            remedy="load the bundle you mean",
        )
    if target:
        _check_target(place / MANIFEST, manifest)
    texts: dict[str, bytes] = {}
    for file in manifest.files:
        if file.path == WEIGHTS:  # last, because it is the largest by far, and read once
            continue
        with verified(place, file.path, num_bytes=file.num_bytes, sha256=file.sha256) as reader:
            if file.path in (SYMBOLS, CONFIG, GENERATION):
                texts[file.path] = reader.read(file.num_bytes)
            elif file.region is not None and packages is not None:
                reader.copy_to(packages / file.path)
    table = read_table(place / SYMBOLS, texts[SYMBOLS], manifest=manifest)
    check_regions(place / MANIFEST, manifest, table=table)
    config = read_config(place / CONFIG, texts[CONFIG])
    if config.num_hidden_layers != manifest.depth:
        raise BundleError(
            place / MANIFEST,
            f"says {count(manifest.depth, 'layer')}, config.json {config.num_hidden_layers}",
        )
    return _Contents(
        manifest, table, config, read_generation(place / GENERATION, texts[GENERATION])
    )


def _check_target(path: Path, manifest: Manifest) -> None:
    if manifest.device not in ("cpu", "cuda"):
        what = (
            f"is of a bundle for device {manifest.device!r}; this polar_fx loads those for "
            "'cpu' and 'cuda'"
        )
        raise BundleError(path, what, remedy=_ELSEWHERE)
    if manifest.device == "cuda" and not torch.cuda.is_available():
        raise BundleError(
            path, "is of a bundle for an NVIDIA GPU, and torch sees none here", remedy=_ELSEWHERE
        )
    if manifest.backend != AotInductorBackend.name:
        raise BundleError(
            path,
            f"names backend {manifest.backend!r}, this polar_fx loads {AotInductorBackend.name!r}",
            remedy=_ELSEWHERE,
        )
    own = f"{torch.__version__} {torch.version.git_version}"
    if manifest.torch != own:
        remedy = f"install torch {manifest.torch.partition(' ')[0]}, or export with this one"
        raise BundleError(
            path, f"is of a bundle for torch {manifest.torch}, and this is {own}", remedy=remedy
        )
    processor = target_of(torch.device(manifest.device))
    if manifest.processor != processor:
        what = f"is of a bundle for processor {manifest.processor!r}, and this is {processor!r}"
        raise BundleError(path, f"{what}: its instructions may be missing here", remedy=_ELSEWHERE)
    length = KvPool(manifest.max_length, torch.device("cpu")).length
    if manifest.kv_length not in (None, length):
        what = (
            f"was compiled for {manifest.kv_length} KV columns, and this polar_fx allocates "
            f"{length}"
        )
        raise BundleError(path, what, remedy="export the bundle with this polar_fx")


class BundledModel(BundleOnTheHub, CompiledModel):
    """A model from a bundle: `forward`, `generate`, `warmup` and all else of `CompiledModel`, over
    its own programs.

    `programs` are those of the manifest, the first the default one. Without regions for many rows,
    rows run one by one. `from_pretrained` takes one from the hub, `push_to_hub` brings it there.
    """

    def __init__(
        self,
        folder: Path,
        contents: _Contents,
        *,
        weights: dict[str, Tensor],
        packages: Path,
        any_program: bool,
    ) -> None:
        manifest = contents.manifest
        self.folder, self.manifest, self.any_program = folder, manifest, any_program
        self.programs = manifest.programs
        self._allowed = frozenset(manifest.programs)
        library = LayerLibrary.from_table(contents.table, weights, capture=_no_graphs(folder))
        regions = _BundledRegions(folder, packages, manifest=manifest, library=library)
        pool = KvPool(manifest.max_length, library.device)
        runner = Runner(
            ModelInfo(contents.config, contents.generation_config, manifest.vocab_size),
            library,
            regions=regions,
            pool=pool,
            prefill_chunk=manifest.prefill_chunk,
            deterministic=manifest.deterministic or not manifest.many_rows,
            tiers=Tiers(
                library, regions, kv_index=pool.kv_index, tier="linked", policy=TierPolicy()
            ),
            graphs=cuda_graphs(library.device, states=library.table.keeps_states),
            bound=None,
        )
        super().__init__(runner, manifest.programs[0])
        # now, not in a request, and while the copies that were hashed are there
        self.regions.get([f.region for f in manifest.files if f.region is not None])
        if any(f.path in PREDICTOR_FILES for f in manifest.files):
            self._dispatch_as_exported()

    def __repr__(self) -> str:
        about = (
            f"depth={self.depth}, {count(len(self.programs), 'program')}, "
            f"max_length={self.pool.max_length}"
        )
        return f"BundledModel({self.manifest.model}, {about}, folder={str(self.folder)!r})"

    def resolve(self, program: ProgramLike) -> Program:
        """As in CompiledModel; raises ProgramError for one that the manifest does not name, unless
        `any_program`.
        """
        chosen = super().resolve(program)
        if self.any_program or chosen in self._allowed:
            return chosen
        raise ProgramError(
            f"program {chosen} is not among the {count(len(self.programs), 'program')} of the "
            f"bundle {self.folder}; add it with add_program and load the bundle again, or load it "
            "with any_program=True"
        )

    def dispatch_by(self, *args: Any, **options: Any) -> Dispatcher:
        """As in CompiledModel; raises ProgramError, unless `any_program`, if the menu names others
        than the bundle does.
        """
        before, dispatcher = self.dispatcher, super().dispatch_by(*args, **options)
        try:
            if not self.any_program and dispatcher.unprepared == "link":
                raise InputError(
                    "unprepared='link' runs programs of no menu; load the bundle with "
                    "any_program=True for that"
                )
            for program in dispatcher.menu.programs:
                self.resolve(program)
        except BaseException:
            self.dispatcher = before
            raise
        return dispatcher

    def choose_by(self, policy: str | Policy) -> Dispatcher:
        """Dispatch by this policy from now on, in place of the one that was exported.

        Without a predictor it is "identity" or a program of the bundle. Raises InputError and
        ProgramError.
        """
        predictor = None if self.dispatcher is None else self.dispatcher.predictor
        dispatcher = self.dispatch_by(predictor, policy=policy)
        if dispatcher.policy.kind == "latency_ms":
            dispatcher.warmup((1,))  # measures what programs cost here
        dispatcher.admit()
        return dispatcher

    def _dispatch_as_exported(self) -> None:
        try:
            selector, policy = load_selector(self.folder / PREDICTOR, self.manifest.weights)
            self.dispatch_by(selector, policy=policy).admit()
        except (InputError, ProgramError) as error:
            raise BundleError(
                self.folder / PREDICTOR,
                f"cannot be used: {error}",
                remedy="export the bundle again",
            ) from error

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was exported."""
        return self.manifest.has_tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that was exported, loaded when it is first asked for.

        Raises InputError if there is none.
        """
        if not self.has_tokenizer:
            raise InputError(
                f"the bundle {self.folder} holds no tokenizer; export it with tokenizer="
            )
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self.folder / TOKENIZER, local_files_only=True, trust_remote_code=False
        )


class _BundledRegions(RegionTable):
    """Regions from the bundle's packages; what is not there is refused."""

    def __init__(
        self, folder: Path, packages: Path, *, manifest: Manifest, library: LayerLibrary
    ) -> None:
        backend = _Sealed(folder, packages, by_address=manifest.kv_length is None)
        super().__init__(library, backend, max_length=manifest.max_length, store=None, workers=0)
        self._folder = folder
        self._packages = {
            f.region: packages / f.path for f in manifest.files if f.region is not None
        }

    def files(self, name: RegionName) -> Mapping[str, Path] | None:
        path = self._packages.get(name)
        return None if path is None else {REGION: path}

    def _build(self, backend: PersistentBackend, wanted: list[RegionName]) -> None:
        for name in wanted:
            _refuse(self._folder, f"region {name}")


class _Sealed(AotInductorBackend):
    """Loads packages as AotInductorBackend does, and compiles nothing."""

    def __init__(self, folder: Path, packages: Path, *, by_address: bool) -> None:
        super().__init__(passes=())
        self.by_address = by_address
        self._folder, self._packages = folder, packages

    def load(self, files: Mapping[str, Path]) -> Region:
        try:
            return super().load(files)
        except Exception as error:  # torch raises RuntimeErrors of many wordings
            place = self._folder / files[REGION].relative_to(self._packages)
            raise BundleError(place, f"cannot be loaded: {first_line(error)}") from error

    def compile_region(self, body: Any, example: Sequence[Tensor], dynamic: Any) -> Region:
        _refuse(self._folder, "a region")

    def export(self, body: Any, example: Sequence[Tensor], dynamic: Any, folder: Path) -> None:
        _refuse(self._folder, "a graph")

    def build(self, folder: Path) -> None:
        _refuse(self._folder, "a region")


def _no_graphs(folder: Path) -> Any:
    return lambda: _refuse(folder, "the model's graphs")


def _refuse(folder: Path, what: str) -> NoReturn:
    raise BundleError(
        folder,
        f"does not hold {what}, and nothing is traced or compiled for a bundle",
        remedy="export it again",
    )

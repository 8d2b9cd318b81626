"""`export`: a compiled model -> a bundle, one folder that is there whole or not at all.

Regions take weights as operands, so layers and programs share one copy of both: a program is a line
of the manifest.
"""

import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..backends import AotInductorBackend
from ..backends.aot_inductor import REGION
from ..backends.base import RegionName
from ..compiled import CompiledModel, ProgramLike
from ..errors import InputError
from ..output.files import copy_file, sync, write_file
from ..output.plain_text import count, dtype_name, size
from ..predictor.saved import save_selector
from ..predictor.selector import Selector
from ..program import Program
from ..runtime.code_key import target_of
from ..runtime.dispatcher import Dispatcher
from ..runtime.regions import RegionTable
from ..store import ArtifactStore
from ..version import __version__
from .contents import region_names
from .errors import BundleError
from .files import digest_of, os_errors
from .loader import BundledModel, verify_bundle
from .manifest import (
    CONFIG,
    GENERATION,
    MANIFEST,
    PREDICTOR,
    PREDICTOR_FILES,
    REGIONS,
    SHARING_FORMAT,
    SYMBOLS,
    TOKENIZER,
    TOKENIZER_SUFFIXES,
    USUAL_FORMAT,
    WEIGHTS,
    BundledFile,
    Manifest,
    write_manifest,
)
from .settings import check_served, config_fields, generation_fields
from .weights import stored_weights

log = logging.getLogger("polar_fx.bundle")

_SPARE_BYTES = 1 << 20  # manifest, settings, file system


def export(
    compiled: CompiledModel,
    out: str | PathLike[str],
    programs: Iterable[ProgramLike] | None = None,
    *,
    buckets: Sequence[int] = (1,),
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a bundle of `compiled` to the new folder `out`; compiles the regions that are not there
    yet.

    Args:
        compiled: of backend "aot_inductor", on the CPU. Its limits and generation defaults become
            the bundle's.
        programs: the programs that may be run, the first by default (None: the model's default
            program, or the menu of its dispatcher, whose selector and policy are shipped along).
        buckets: rows that calls have. (1,): one at a time, batches row by row; with any number from
            2 up: batches, too.
        tokenizer: what has a `save_pretrained`, to be shipped along; a bundle with one can be
            served, and its generation defaults have to be such as a server follows.
        overwrite: replace a bundle that is there; anything else is never replaced.

    Raises InputError, ProgramError, CompileError, and BundleError if the folder cannot be written.
    Whenever it is interrupted, what is there under the name `out` is nothing, the former bundle or
    the new one, never a part of one.
    """
    _check_kind(compiled, tokenizer)
    chosen = programs_to_ship(compiled, programs)
    if compiled.dispatcher is not None:
        _check_dispatcher(compiled.dispatcher, chosen)
    if not buckets or any(type(b) is not int or b < 1 for b in buckets):
        raise InputError(
            f"buckets must be numbers of rows, such as (1,) or (1, 2), got {buckets!r}"
        )
    target = check_target(out, overwrite)
    with os_errors(target), tempfile.TemporaryDirectory(prefix="polar_fx-") as spare:
        many_rows = max(buckets) > 1 and not compiled.deterministic
        draft = _draft(compiled, chosen, many_rows=many_rows)
        packages = _packages(
            compiled, region_names(compiled.library.table, draft.shapes), spare=Path(spare)
        )
        weights, ties = stored_weights(compiled.library.tensors, compiled.library.table)
        num_bytes = sum(t.nbytes for t in weights.values())
        num_bytes += sum(p.stat().st_size for p in packages.values())
        require_room(target.parent, num_bytes)
        with new_folder(target, overwrite) as work:
            save_weights(weights, work / WEIGHTS)
            manifest = _write(
                compiled,
                replace(draft, ties=ties),
                packages=packages,
                tokenizer=tokenizer,
                work=work,
            )
    log.info("wrote %s: %s, %s", target, count(len(chosen), "program"), size(manifest.num_bytes))
    return manifest


def _check_kind(compiled: object, tokenizer: object) -> None:
    """Raise InputError unless this is a model whose code can be shipped."""
    if not isinstance(compiled, CompiledModel):
        raise InputError(
            f"export takes what polar_fx.compile returns, got {type(compiled).__name__}"
        )
    if isinstance(compiled, BundledModel):
        raise InputError(
            f"{compiled.folder} is a bundle already; copy the folder, and change its programs "
            "with add_program"
        )
    if type(compiled.backend) is not AotInductorBackend:
        raise InputError(
            f"backend {compiled.backend.name!r} makes no code that can be shipped; compile with "
            "backend='aot_inductor'"
        )
    if compiled.device.type not in ("cpu", "cuda"):
        raise InputError(
            f"bundles are for the CPU and CUDA, and the model is on {compiled.device}; compile it "
            "on one of them"
        )
    if tokenizer is not None:
        check_served(compiled.generation_config)


def _check_dispatcher(dispatcher: Dispatcher, chosen: Sequence[Program]) -> None:
    """Raise InputError unless a bundle of these programs can dispatch in the same way."""
    if not isinstance(dispatcher.predictor, Selector):
        raise InputError(
            "the model's predictor is no Selector; set compiled.dispatcher = None to export "
            "without it"
        )
    if dispatcher.menu != dispatcher.predictor.menu:
        raise InputError(
            "the model dispatches by another menu than its predictor's; only the predictor's "
            "own can be shipped"
        )
    if dispatcher.policy.kind == "latency_ms":
        raise InputError(
            "policy latency_ms<= is measured where it runs; set another one, and "
            "dispatch_by() after loading"
        )
    if missing := [p for p in dispatcher.menu.programs if p not in chosen]:
        raise InputError(
            f"the predictor may choose {missing[0]}, which is not among programs=; leave that "
            "out, or add it"
        )


def programs_to_ship(
    compiled: CompiledModel, programs: Iterable[ProgramLike] | None
) -> tuple[Program, ...]:
    """The programs, each once; None: the default one, or the dispatcher's menu.

    Raises InputError and ProgramError.
    """
    dispatcher = compiled.dispatcher
    by_default: Sequence[ProgramLike] = (None,) if dispatcher is None else dispatcher.menu.programs
    chosen = tuple(
        dict.fromkeys(compiled.resolve(p) for p in (by_default if programs is None else programs))
    )
    if not chosen:
        raise InputError(
            "an export needs at least one program; leave programs= out for the default one"
        )
    return chosen


def check_target(out: str | PathLike[str], overwrite: bool, *, mark: str = MANIFEST) -> Path:
    """The absolute path of a folder that may be written; what is overwritten must hold a file
    `mark`.

    Raises BundleError.
    """
    # not resolved: a link under that name is an existing thing, too
    target = Path(os.path.abspath(out))
    if not target.parent.is_dir():
        raise BundleError(
            target, "is in no folder that exists", remedy=f"make {target.parent} first"
        )
    if not os.path.lexists(target):
        return target
    if not overwrite:
        raise BundleError(
            target, "exists already", remedy="name another folder, or say overwrite=True"
        )
    if target.is_symlink() or not (target / mark).is_file():
        what = "is no bundle" if mark == MANIFEST else f"holds no {mark}"
        raise BundleError(
            target,
            f"is there and {what}, so it is not overwritten",
            remedy="name another folder, or remove it",
        )
    return target


def require_room(folder: Path, num_bytes: int) -> None:
    """Raises BundleError if the disk has less left, and some for manifest, settings and file
    system.
    """
    needed = num_bytes + _SPARE_BYTES
    if (free := shutil.disk_usage(folder).free) < needed:
        raise BundleError(
            folder,
            f"has {size(free)} left, and the bundle takes {size(needed)}",
            remedy="free some space there, or name another disk",
        )


@contextmanager
def new_folder(target: Path, overwrite: bool, *, mark: str = MANIFEST) -> Iterator[Path]:
    """A hidden folder beside `target` to write into, which then gets that name; removed if that
    does not come to pass.

    Raises BundleError for what the operating system refuses, and as `check_target`.
    """
    work = target.parent / f".{target.name}.{secrets.token_hex(8)}.part"
    with os_errors(target):
        try:
            work.mkdir()
            yield work
            _place(work, target, overwrite=overwrite, mark=mark)
        finally:
            shutil.rmtree(work, ignore_errors=True)  # gone already if all went well


def _draft(compiled: CompiledModel, programs: tuple[Program, ...], *, many_rows: bool) -> Manifest:
    """The manifest without what is only known once the files are written."""
    library = compiled.library
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        polar_fx=__version__,
        model=compiled.architecture,
        depth=library.depth,
        dtype=dtype_name(library.dtype),
        vocab_size=compiled.vocab_size,
        device=compiled.device.type,
        processor=target_of(compiled.device),
        torch=f"{torch.__version__} {torch.version.git_version}",
        threads=torch.get_num_threads(),
        backend=compiled.backend.name,
        max_length=compiled.pool.max_length,
        # on a GPU, bundles hold regions for slots
        kv_length=None
        if compiled.runner.addresses and compiled.device.type == "cpu"
        else compiled.pool.length,
        prefill_chunk=compiled.prefill_chunk,
        many_rows=many_rows,
        deterministic=compiled.deterministic,
        graphs=library.fingerprint,
        weights=library.model_fingerprint,
        programs=programs,
        ties={},
        files=(),
        frequency_switch=compiled.runner.switch,
        version=SHARING_FORMAT if library.table.owners else USUAL_FORMAT,
    )


def _packages(
    compiled: CompiledModel, wanted: list[RegionName], *, spare: Path
) -> dict[RegionName, Path]:
    """Copies of the compiled packages, in `spare`: in the store others could remove them before
    they are shipped.
    """
    regions = compiled.regions
    found: dict[RegionName, Path] = {}
    copies = spare / "regions"
    copies.mkdir()

    def take(table: RegionTable) -> None:
        missing = [w for w in wanted if w not in found]
        table.get(missing)
        for name in missing:
            files = table.files(name)
            copy = copies / f"{len(found)}.pt2"
            try:
                if files is not None:
                    copy_file(files[REGION], copy)
                    found[name] = copy
            except FileNotFoundError:  # another process needed the room
                copy.unlink(missing_ok=True)

    if regions.store is not None:
        take(regions)
    # without a store, or with one that has no room for all: once more, in a place of our own
    if len(found) < len(wanted):
        store = ArtifactStore(spare / "store", limit_bytes=0)
        take(
            RegionTable(
                compiled.library,
                compiled.backend,
                max_length=regions.max_length,
                store=store,
                workers=regions.workers,
            )
        )
    return found


def _write(
    compiled: CompiledModel,
    draft: Manifest,
    *,
    packages: dict[RegionName, Path],
    tokenizer: Any,
    work: Path,
) -> Manifest:
    """Write everything but the weights into `work`, then read it as a loader would."""
    (work / REGIONS).mkdir()
    write_file(work / SYMBOLS, compiled.library.table.to_json().encode())
    config = config_fields(compiled.config, compiled.depth)
    write_file(work / CONFIG, json.dumps(config, indent=1).encode())
    generation = generation_fields(compiled.generation_config)
    write_file(work / GENERATION, json.dumps(generation, indent=1).encode())
    regions: dict[str, RegionName] = {}
    for name, package in packages.items():
        rows = "one-row" if name.shape.batch else "rows"
        tokens = "one-token" if name.shape.tokens else "tokens"
        part = f"{name.graph}.{rows}.{tokens}.pt2"
        regions[REGIONS + part] = name
        copy_file(package, work / REGIONS / part)
    paths = [
        WEIGHTS,
        SYMBOLS,
        CONFIG,
        GENERATION,
        *regions,
        *_save_tokenizer(tokenizer, work),
        *_save_predictor(compiled, work),
    ]
    for folder in {(work / p).parent for p in paths}:
        sync(folder)
    files = tuple(
        BundledFile(p, (work / p).stat().st_size, digest_of(work / p), regions.get(p))
        for p in paths
    )
    manifest = replace(draft, files=files)
    write_manifest(work, manifest)
    verify_bundle(work)
    return manifest


def save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write a new safetensors file, durably. Raises BundleError."""
    try:
        save_file(weights, path)
    except SafetensorError as error:  # in which the system's own error is but text
        raise BundleError(
            path,
            f"cannot be written: {error}",
            remedy="free some space there, or name a folder on another disk",
        ) from error
    # safetensors writes for the owner alone
    path.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)
    sync(path)


def _save_tokenizer(tokenizer: Any, work: Path) -> list[str]:
    """Paths of the tokenizer's files.

    Raises InputError for one that comes with code or formats of its own.
    """
    if tokenizer is None:
        return []
    place = work / TOKENIZER
    tokenizer.save_pretrained(place)
    files = sorted(f for f in place.rglob("*") if not f.is_dir())
    for file in files:
        if file.suffix not in TOKENIZER_SUFFIXES:
            raise InputError(
                f"the tokenizer saves {file.name}, which a bundle cannot ship; export without "
                "tokenizer="
            )
        sync(file)
    return [f.relative_to(work).as_posix() for f in files]


def _save_predictor(compiled: CompiledModel, work: Path) -> list[str]:
    """Paths of the dispatcher's selector and policy."""
    if compiled.dispatcher is None:
        return []
    selector = compiled.dispatcher.predictor
    assert isinstance(selector, Selector)
    save_selector(
        selector,
        work / PREDICTOR,
        model=compiled.library.model_fingerprint,
        policy=compiled.dispatcher.policy,
    )
    for path in PREDICTOR_FILES:
        sync(work / path)
    return list(PREDICTOR_FILES)


def _place(work: Path, target: Path, *, overwrite: bool, mark: str) -> None:
    """Give the finished folder its name.

    There is never a half bundle under that name; for a moment there may be none.
    """
    if overwrite and os.path.lexists(target):
        check_target(target, overwrite, mark=mark)
        former = work.with_suffix(".former")
        os.rename(target, former)
        try:
            os.rename(work, target)
        except BaseException:
            with suppress(OSError):
                os.rename(former, target)
            raise
        try:
            sync(target.parent)
        finally:
            shutil.rmtree(former, ignore_errors=True)
        return
    if os.path.lexists(target):  # since it was looked for: rename would replace an empty folder
        raise BundleError(
            target, "exists already", remedy="name another folder, or say overwrite=True"
        )
    os.rename(work, target)
    sync(target.parent)

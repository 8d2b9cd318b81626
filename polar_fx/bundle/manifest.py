"""`manifest.json`: what a bundle holds, where it runs, and its programs.

The manifest is readable, strict (no unknown field, no wrong type) and carries a checksum of itself.
Everything else in a bundle is named in it by size and sha256.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ProgramError
from ..output.digest import digest
from ..output.files import replace_file
from ..output.plain_text import count, first_line
from ..program import MAX_STEPS, Program
from ..program.slots import slot_steps
from ..region_names import RegionName, ShapeClass
from .errors import AGAIN, BundleError
from .fields import SHA256, Fields
from .files import MAX_JSON_BYTES, os_errors, parse_json, problem_of_path, read_small

try:
    import fcntl
except ImportError:  # not POSIX: two processes that edit one manifest at once are on their own
    fcntl = None

FORMAT, USUAL_FORMAT, SHARING_FORMAT = 3, 2, 3  # the newest; the last of layers that share slots
MANIFEST = "manifest.json"
KIND = "polar_fx_bundle"  # the name under which the format's version stands

WEIGHTS, SYMBOLS, CONFIG, GENERATION = (
    "weights.safetensors",
    "symbols.json",
    "config.json",
    "generation.json",
)
REGIONS, TOKENIZER = "regions/", "tokenizer/"
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
PREDICTOR = "predictor/"
PREDICTOR_FILES = (PREDICTOR + "predictor.json", PREDICTOR + "predictor.safetensors")

MAX_LENGTH = 1 << 22  # tokens a row
_MAX_FILE_BYTES = 1 << 44
_MAX_PROGRAMS, _MAX_PROGRAM_TEXT = 1 << 16, 1 << 16
_MAX_FILES, _MAX_TIES = 4096, 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")

_LIMITS = ("max_length", "prefill_chunk", "many_rows", "deterministic")
# only of regions for slots; only of models that have it
_COLUMNS, _SWITCH = "kv_length", "frequency_switch"
_ALL = (
    KIND,
    "created",
    "polar_fx",
    "model",
    "target",
    "limits",
    "fingerprints",
    "programs",
    "ties",
    "files",
    "checksum",
)


@dataclass(frozen=True)
class BundledFile:
    """One file: its path in the bundle, bytes and sha256.

    Of a region also its name.
    """

    path: str
    num_bytes: int
    sha256: str
    region: RegionName | None = None


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds. The first of `programs` is what calls without `program=` run.

    `graphs` and `weights` are fingerprints (sha256) of the symbol table, and of it and all weights.
    `ties` names tensors that are another one of the weights file. `max_length` is in tokens a row.
    `kv_length` is in allocated columns of a KV slot, None if regions take keys and values in
    blocks. `many_rows` says whether regions for two rows and
    more are there; else rows run one by one. Past `frequency_switch` tokens, if it is a number, all
    of a row is computed with other rotary frequencies. `version` is that of the format.
    """

    created: str
    polar_fx: str
    model: str
    depth: int
    dtype: str
    vocab_size: int
    device: str
    processor: str
    torch: str
    threads: int
    backend: str
    max_length: int
    kv_length: int | None
    prefill_chunk: int
    many_rows: bool
    deterministic: bool
    graphs: str
    weights: str
    programs: tuple[Program, ...]
    ties: dict[str, str]
    files: tuple[BundledFile, ...]
    frequency_switch: int | None = None
    version: int = USUAL_FORMAT

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(f.num_bytes for f in self.files)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was exported."""
        return any(f.path.startswith(TOKENIZER) for f in self.files)

    def file(self, path: str) -> BundledFile:
        """The file of that path, which must be there."""
        return next(f for f in self.files if f.path == path)

    @property
    def fingerprint(self) -> str:
        """Sha256 of everything here but the programs: the same before and after `add_program` and
        `remove_program`.
        """
        return digest(
            {k: v for k, v in self.to_dict().items() if k not in ("programs", "checksum")}
        )

    @property
    def shapes(self) -> tuple[ShapeClass, ...]:
        """The shape classes that must be there: many tokens and one, of one row and perhaps of
        more.
        """
        rows = (1, None) if self.many_rows else (1,)
        tokens = (None, 1) if min(self.max_length, self.prefill_chunk) > 1 else (1,)
        return tuple(ShapeClass(b, t, self.kv_length) for b in rows for t in tokens)

    def to_dict(self) -> dict[str, Any]:
        """The JSON values that `manifest.json` holds, checksum included."""
        fields: dict[str, Any] = {
            KIND: self.version,
            "created": self.created,
            "polar_fx": self.polar_fx,
            "model": {
                "name": self.model,
                "depth": self.depth,
                "dtype": self.dtype,
                "vocab_size": self.vocab_size,
            },
            "target": {
                "device": self.device,
                "processor": self.processor,
                "torch": self.torch,
                "threads": self.threads,
                "backend": self.backend,
            },
            "limits": {
                "max_length": self.max_length,
                **({} if (columns := self.kv_length) is None else {_COLUMNS: columns}),
                "prefill_chunk": self.prefill_chunk,
                "many_rows": self.many_rows,
                "deterministic": self.deterministic,
                **({} if (switch := self.frequency_switch) is None else {_SWITCH: switch}),
            },
            "fingerprints": {"graphs": self.graphs, "weights": self.weights},
            "programs": list(map(str, self.programs)),
            "ties": self.ties,
            "files": list(map(_file_fields, self.files)),
        }
        return fields | {"checksum": digest(fields)}


# ------------------------------------------------------------------------------------------ reading


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle at `folder`; no other file is looked at. Raises BundleError."""
    path = folder / MANIFEST
    if not os.path.isdir(folder):  # unlike the method, it takes a name that is too long
        raise BundleError(folder, "is not a folder", "name the folder that polar_fx.export wrote")
    if not os.path.lexists(path):
        raise BundleError(
            path,
            "is missing: this is no bundle, or not a whole one",
            "name the folder that polar_fx.export wrote",
        )
    values = parse_json(path, read_small(path))
    version = values.get(KIND) if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(
            path, f"has no format version under {KIND!r}: it is not the manifest of a bundle"
        )
    if version > FORMAT:
        raise BundleError(
            path,
            f"has format {version}, and this polar_fx reads formats up to {FORMAT}",
            "update polar_fx, or export with this one",
        )
    fields = Fields(path, "", value=values, names=_ALL)
    stated = fields.text("checksum", SHA256)
    try:
        actual = digest({k: v for k, v in values.items() if k != "checksum"})
    except ValueError as error:  # 1e999
        raise BundleError(path, f"holds a number that is none: {error}") from error
    if stated != actual:
        raise BundleError(
            path,
            "was edited: its checksum does not fit",
            f"change programs with add_program and remove_program, or {AGAIN}",
        )
    return _manifest(fields)


def _manifest(fields: Fields) -> Manifest:
    model = fields.section("model", ("name", "depth", "dtype", "vocab_size"))
    target = fields.section("target", ("device", "processor", "torch", "threads", "backend"))
    stated = fields.mapping("limits", len(_LIMITS) + 2)
    more = [name for name in (_COLUMNS, _SWITCH) if name in stated]
    limits = fields.section("limits", (*_LIMITS, *more))
    prints = fields.section("fingerprints", ("graphs", "weights"))
    depth, max_length = (
        model.number("depth", 1, high=MAX_STEPS),
        limits.number("max_length", 1, high=MAX_LENGTH),
    )
    ties = fields.mapping("ties", _MAX_TIES)
    if not all(type(t) is str for t in ties.values()):
        raise fields.wrong("ties", "must map names of tensors to names of tensors")
    return Manifest(
        created=fields.text("created"),
        polar_fx=fields.text("polar_fx"),
        model=model.text("name"),
        depth=depth,
        dtype=model.text("dtype", _NAME),
        vocab_size=model.number("vocab_size", 1, high=1 << 31),
        device=target.text("device"),
        processor=target.text("processor"),
        torch=target.text("torch"),
        threads=target.number("threads", 0, high=1 << 16),
        backend=target.text("backend", _NAME),
        max_length=max_length,
        kv_length=limits.number(_COLUMNS, max_length + 1, high=2 * MAX_LENGTH)
        if _COLUMNS in more
        else None,
        prefill_chunk=limits.number("prefill_chunk", 1, high=1 << 31),
        many_rows=limits.flag("many_rows"),
        deterministic=limits.flag("deterministic"),
        graphs=prints.text("graphs", SHA256),
        weights=prints.text("weights", SHA256),
        programs=_programs(fields, depth),
        ties=ties,
        files=_files(fields),
        frequency_switch=limits.number(_SWITCH, 1, high=MAX_LENGTH) if _SWITCH in more else None,
        version=fields.number(KIND, 1, high=FORMAT),
    )


def _programs(fields: Fields, depth: int) -> tuple[Program, ...]:
    found: dict[Program, str] = {}
    for text in fields.texts("programs", 1, most=_MAX_PROGRAMS, each=_MAX_PROGRAM_TEXT):
        try:
            program = Program.parse(text, depth)
        except ProgramError as error:
            raise fields.wrong(
                "programs",
                f"holds {text[:80]!r}, which is no program of {count(depth, 'layer')}: "
                f"{first_line(error)}",
            ) from error
        if program in found:
            raise fields.wrong(
                "programs", f"holds one program twice, as {found[program]!r} and as {text[:80]!r}"
            )
        found[program] = text[:80]
    return tuple(found)


def _files(fields: Fields) -> tuple[BundledFile, ...]:
    found: dict[str, BundledFile] = {}
    for number, entry in enumerate(fields.items("files", 1, most=_MAX_FILES)):
        where = f"files[{number}]"
        is_region = isinstance(entry, dict) and ("region" in entry or "shapes" in entry)
        names = ("path", "bytes", "sha256", *(("region", "shapes") if is_region else ()))
        file = Fields(fields.path, where, value=entry, names=names)
        path = file.text("path", most=1024)
        if problem := problem_of_path(path):
            raise file.wrong("path", f"{problem}: {path[:80]!r}")
        if path.casefold() in found:  # on some systems names that differ in case are one
            raise file.wrong("path", f"names {path!r} a second time")
        region = None
        if is_region:
            region = _region(file)
        if not _belongs(path, is_region):
            raise file.wrong("path", f"names {path!r}, which has no place in a bundle")
        size = file.number(
            "bytes", 1, high=_MAX_FILE_BYTES if path == WEIGHTS or is_region else MAX_JSON_BYTES
        )
        found[path.casefold()] = BundledFile(path, size, file.text("sha256", SHA256), region)
    for path in (WEIGHTS, SYMBOLS, CONFIG, GENERATION):
        if path not in found:
            raise fields.wrong("files", f"does not name {path}")
    regions = [f.region for f in found.values() if f.region]
    if len(set(regions)) != len(regions):
        raise fields.wrong("files", "names one region twice")
    return tuple(found.values())


def _file_fields(file: BundledFile) -> dict[str, Any]:
    fields = {"path": file.path, "bytes": file.num_bytes, "sha256": file.sha256}
    if file.region is not None:
        fields |= {"region": file.region.graph, "shapes": str(file.region.shape)}
    return fields


def _region(file: Fields) -> RegionName:
    try:
        shape = ShapeClass.parse(file.text("shapes"))
    except ValueError as error:
        raise file.wrong("shapes", "is no class of shapes") from error
    if shape.length == 0:
        raise file.wrong("shapes", "is no class of shapes of a bundle: it names no KV length")
    try:
        return RegionName.of(file.text("region", _NAME), shape)
    except ValueError as error:
        raise file.wrong("region", "is no region's name") from error


def _belongs(path: str, is_region: bool) -> bool:
    if is_region:
        return path.startswith(REGIONS) and path.endswith(".pt2")
    if path.startswith(TOKENIZER):
        return path.endswith(TOKENIZER_SUFFIXES)
    return path in (WEIGHTS, SYMBOLS, CONFIG, GENERATION, *PREDICTOR_FILES)


# ------------------------------------------------------------------------------------------ writing


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace the manifest: a reader sees the old one or the new one, whole.

    Raises BundleError.
    """
    path = folder / MANIFEST
    with os_errors(path):
        replace_file(path, [(json.dumps(manifest.to_dict(), indent=1) + "\n").encode()])


def add_program(
    folder: str | os.PathLike[str], program: Program | str, *, default: bool = False
) -> Manifest:
    """Add a program to the bundle at `folder`, as the default one if `default`; nothing but its
    manifest is rewritten.

    One that is there already stays where it is, unless it becomes the default. Raises BundleError,
    and ProgramError for a program of another depth, or one that skips a layer whose keys and values
    a later one reads.
    """
    with _edited(Path(folder)) as manifest:
        added = _resolve(program, manifest.depth)
        if manifest.version >= SHARING_FORMAT:
            slot_steps(added, _owners(Path(folder)))
        rest = tuple(p for p in manifest.programs if p != added)
        there = manifest.programs if added in manifest.programs else (*rest, added)
        programs = (added, *rest) if default else there
        if len(programs) > _MAX_PROGRAMS:
            raise BundleError(
                folder,
                f"holds {_MAX_PROGRAMS:,} programs already",
                "remove some, or load it with any_program=True",
            )
        changed = replace(manifest, programs=programs)
        write_manifest(Path(folder), changed)
    return changed


def remove_program(folder: str | os.PathLike[str], program: Program | str) -> Manifest:
    """Remove a program from the bundle at `folder`; if it was the default, the next one is. Only
    the manifest is rewritten.

    Raises BundleError, also if it is not there or the only one.
    """
    with _edited(Path(folder)) as manifest:
        gone = _resolve(program, manifest.depth)
        programs = tuple(p for p in manifest.programs if p != gone)
        if len(programs) == len(manifest.programs):
            raise BundleError(
                folder, f"holds no program {gone}", "remove one of those that its manifest names"
            )
        if not programs:
            raise BundleError(folder, f"{gone} is its only program", "add another one first")
        changed = replace(manifest, programs=programs)
        write_manifest(Path(folder), changed)
    return changed


def _resolve(program: Program | str, depth: int) -> Program:
    if isinstance(program, str):
        return Program.parse(program, depth)
    if program.depth != depth:
        raise ProgramError(
            f"program {program} has depth {program.depth} but the bundle has "
            f"{count(depth, 'layer')}"
        )
    return program


def _owners(folder: Path) -> dict[int, int]:
    """The layers that read keys and values of others, and of which. Raises BundleError."""
    path = folder / SYMBOLS
    table = parse_json(path, read_small(path))
    try:
        return {int(reader): int(owner) for reader, owner in table.get("owners", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise BundleError(path, f"is no symbol table: {error}", AGAIN) from error


@contextmanager
def _edited(folder: Path) -> Iterator[Manifest]:
    """The manifest, with the folder locked against others that edit it."""
    # before the lock: it says what is wrong with a folder that is no bundle
    manifest = read_manifest(folder)
    if fcntl is None:
        yield manifest
        return
    with os_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield read_manifest(folder)
    finally:
        os.close(handle)

"""A bundle on the HuggingFace hub: its files, its card, and whose code is run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from ..environment import cache_dir
from ..errors import InputError
from ..hub import OnTheHub, card
from ..output.files import copy_file, replacing
from ..output.plain_text import size
from .errors import BundleError
from .files import os_errors
from .manifest import (
    CONFIG,
    GENERATION,
    MANIFEST,
    PREDICTOR_FILES,
    REGIONS,
    SYMBOLS,
    TOKENIZER,
    TOKENIZER_SUFFIXES,
    WEIGHTS,
    Manifest,
    read_manifest,
)


class BundleOnTheHub(OnTheHub):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of a bundle.

    **A bundle holds compiled code.** One from the hub is loaded by the fingerprint that it must
    have (`fingerprint=`, which its maker names), or with `trust_remote_code=True`.
    """

    folder: Path
    hub_kind = "bundle"
    hub_files = (
        MANIFEST,
        WEIGHTS,
        SYMBOLS,
        CONFIG,
        GENERATION,
        f"{REGIONS}*",
        *(f"{TOKENIZER}*{suffix}" for suffix in TOKENIZER_SUFFIXES),
        *PREDICTOR_FILES,
    )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        trust_remote_code: bool = False,
        **where: Any,
    ) -> Self:
        """The bundle of a local folder, as `load_bundle`, or of a repository of the hub.

        Args:
            name: the folder, or `user/name`; a folder that is there is taken before the hub.
            fingerprint: the `Manifest.fingerprint` that the bundle must have.
            trust_remote_code: run the code of a bundle from the hub whose fingerprint is not given.
            where: `revision`, `local_files_only` and `token`, as `SavedPredictor.from_pretrained`
                takes them, and `any_program` of `load_bundle`.

        Raises BundleError, ModelNotFoundError for what cannot be fetched, and InputError before
        anything is fetched whose code is not trusted.
        """
        if not (fingerprint or trust_remote_code or Path(name).expanduser().is_dir()):
            raise InputError(
                f"{os.fspath(name)!r} is no local folder, and a bundle from the hub holds compiled "
                "code that would run here; give the fingerprint= that it must have, or say "
                "trust_remote_code=True"
            )
        return super().from_pretrained(name, fingerprint=fingerprint, **where)

    @classmethod
    def _read_folder(cls, place: Path, **options: Any) -> Self:
        from .loader import load_bundle

        loaded: Any = load_bundle(place, **options)
        return loaded

    @classmethod
    def _read_fetched(cls, place: Path, **options: Any) -> Self:
        return cls._read_folder(_without_links(place), **options)

    def _write_folder(self, place: Path) -> Path:
        if place.is_dir() and any(place.iterdir()):
            raise BundleError(
                place, "is there and not empty", remedy="name another folder, or empty it"
            )
        with os_errors(place), replacing(place) as work:
            self._each_file(work, copy_file)
        return place

    def _upload_folder(self, place: Path) -> Path:
        self._each_file(place, lambda source, target: target.symlink_to(source.resolve()))
        return place

    def _each_file(self, folder: Path, take: Callable[[Path, Path], Any]) -> None:
        """Each file of the bundle, and where it lies in that folder, whose folders are made."""
        for path in (*(file.path for file in read_manifest(self.folder).files), MANIFEST):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            take(self.folder / path, target)

    def _card(self, about: str) -> str:
        manifest = read_manifest(self.folder)
        return card(
            f"Programs of layers of {manifest.model}, compiled",
            tags=("layer-skipping", "aot-inductor"),
            parts=(*_facts(manifest), about, _use(manifest)),
        )


def _facts(manifest: Manifest) -> tuple[str, str]:
    programs = "\n".join(f"| `{p}` | {p.num_steps} |" for p in manifest.programs)
    return (
        f"Weights ({manifest.dtype}), compiled regions and programs of a model of {manifest.depth} "
        f"layers, {size(manifest.num_bytes)} in all, for rows of up to {manifest.max_length} "
        f"tokens. It runs on {manifest.device} with torch {manifest.torch.split()[0]} and a "
        f"processor of this kind alone: `{manifest.processor}`.",
        f"| program | steps |\n|---|---|\n{programs}",
    )


def _use(manifest: Manifest) -> str:
    return (
        "A bundle holds compiled code: load it by its fingerprint, or from those you trust.\n\n"
        "```python\nimport polar_fx\n\n"
        'bundle = polar_fx.BundledModel.from_pretrained(\n    "user/name",\n'
        f'    fingerprint="{manifest.fingerprint}",\n)\n```'
    )


def _without_links(snapshot: Path) -> Path:
    """The same files in a folder of their own; those of the hub's cache are symbolic links, which a
    bundle must not hold. Hard links where the file system has them, so nothing is there twice.
    """
    name = f"{snapshot.parent.parent.name}-{snapshot.name}"
    target = cache_dir() / "models" / name
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if _sizes(target) == _sizes(snapshot):
                return target
            with replacing(target) as work:
                for path in sorted(p for p in snapshot.rglob("*") if p.is_file()):
                    _link_or_copy(path.resolve(), work / path.relative_to(snapshot))
    return target


def _sizes(folder: Path) -> dict[str, int]:
    """Of its files, by path; of what links lead to."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        copy_file(source, target)

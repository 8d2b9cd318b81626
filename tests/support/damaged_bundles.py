"""Ways to damage a bundle, and the check that it is refused for the right reason."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from polar_fx.backends import AotInductorBackend
from polar_fx.bundle import BundleError, load_bundle
from polar_fx.errors import PolarError
from tiny_bundles import Mutable

REGION = "regions/layer_kind_0.one-row.one-token.pt2"


Mutation = Callable[[Mutable], None]


def text(content: str | bytes) -> Mutation:
    """The manifest is this text."""
    return lambda b: b.put(
        "manifest.json", content if isinstance(content, bytes) else content.encode()
    )


def field(path: str, value: Any) -> Mutation:
    """A field of the manifest, named a.b, has this value; the checksum fits."""

    def mutate(b: Mutable) -> None:
        manifest = b.manifest()
        *outer, name = path.split(".")
        inside = manifest
        for part in outer:
            inside = inside[part]
        inside[name] = value
        b.sign(manifest)

    return mutate


def file(which: str, **values: Any) -> Mutation:
    """Fields of a file's entry have these values, None removes one; the checksum fits."""

    def mutate(b: Mutable) -> None:
        manifest = b.manifest()
        (entry,) = (f for f in manifest["files"] if f["path"] == which)
        entry |= values
        for name in [n for n, v in values.items() if v is None]:
            del entry[name]
        b.sign(manifest)

    return mutate


def edit(change: Callable[[dict[str, Any]], Any]) -> Mutation:
    """The manifest is changed by a function; the checksum fits."""

    def mutate(b: Mutable) -> None:
        manifest = b.manifest()
        change(manifest)
        b.sign(manifest)

    return mutate


def again(which: str, **values: Any) -> Mutation:
    """The entry of a file is there a second time, with other values."""
    return edit(
        lambda m: m["files"].append({**next(f for f in m["files"] if f["path"] == which), **values})
    )


def cut(path: str, num_bytes: int) -> Mutation:
    return lambda b: b.put(path, (b.folder / path).read_bytes()[:num_bytes])


def linked(path: str) -> Mutation:
    """A file or folder is the same one, elsewhere, through a link."""

    def mutate(b: Mutable) -> None:
        place, elsewhere = b.folder / path, b.folder.parent / "elsewhere"
        os.rename(place, elsewhere)
        place.symlink_to(elsewhere)

    return mutate


def removed(path: str) -> Mutation:
    return lambda b: (b.folder / path).unlink()


def fifo(path: str) -> Mutation:
    def mutate(b: Mutable) -> None:
        (b.folder / path).unlink()
        os.mkfifo(b.folder / path)

    return mutate


def as_folder(path: str) -> Mutation:
    def mutate(b: Mutable) -> None:
        (b.folder / path).unlink()
        (b.folder / path).mkdir()

    return mutate


def sparse(path: str, num_bytes: int) -> Mutation:
    def mutate(b: Mutable) -> None:
        b.put(path, b"")
        os.truncate(b.folder / path, num_bytes)

    return mutate


def check_refused(
    mutate: Mutation, reason: str, *, bundle: Mutable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle mutated so is refused for that reason, and nothing of it is loaded."""
    mutate(bundle)
    loaded: list[Any] = []
    monkeypatch.setattr(AotInductorBackend, "load", lambda *a, **k: loaded.append(a))
    monkeypatch.setattr("polar_fx.bundle.loader.BundledModel", lambda *a, **k: loaded.append(a))
    with pytest.raises(BundleError, match=reason) as caught:
        load_bundle(bundle.folder, any_program=True)
    assert not loaded, "refused before anything was loaded"
    error = caught.value
    assert (
        isinstance(error, PolarError)
        and error.path.startswith(str(bundle.folder))
        and error.reason
        and error.remedy
    )
    assert str(error) == f"{error.path}: {error.reason}; {error.remedy}"


WEIGHTS = "weights.safetensors"

"""Bundles with damaged files, and with files that are made up while the manifest vouches for them,
are refused as well.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from damaged_bundles import (
    REGION,
    WEIGHTS,
    Mutation,
    as_folder,
    check_refused,
    cut,
    fifo,
    removed,
)
from polar_fx.bundle import BundleError, load_bundle, verify_bundle
from polar_fx.bundle.weights import load_weights
from tiny_bundles import Mutable


def symbols(change: Callable[[dict[str, Any]], Any]) -> Mutation:
    """The symbol table is changed, and the manifest fits."""

    def mutate(b: Mutable) -> None:
        table = json.loads((b.folder / "symbols.json").read_text())
        change(table)
        b.forge("symbols.json", json.dumps(table, indent=1).encode())

    return mutate


def settings(path: str, **values: Any) -> Mutation:
    """config.json or generation.json have other values, and the manifest fits."""

    def mutate(b: Mutable) -> None:
        b.forge(path, json.dumps(json.loads((b.folder / path).read_text()) | values).encode())

    return mutate


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Mutation:
    """The weights are changed, and the manifest fits."""

    def mutate(b: Mutable) -> None:
        tensors = load_file(b.folder / "weights.safetensors")
        change(tensors)
        save_file(tensors, b.folder / "new")
        content = (b.folder / "new").read_bytes()
        b.forge("weights.safetensors", content)

    return mutate


def flipped(path: str, at: int = 1000) -> Mutation:
    def mutate(b: Mutable) -> None:
        content = bytearray((b.folder / path).read_bytes())
        content[at % len(content)] ^= 1
        b.put(path, bytes(content))

    return mutate


def swapped(one: str, two: str) -> Mutation:
    def mutate(b: Mutable) -> None:
        first, second = (b.folder / p for p in (one, two))
        os.rename(first, b.folder / "x")
        os.rename(second, first)
        os.rename(b.folder / "x", second)

    return mutate


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    # files
    "region missing": (removed(REGION), r"one-token\.pt2: is missing"),
    "weights missing": (removed(WEIGHTS), r"weights\.safetensors: is missing"),
    "symbols missing": (removed("symbols.json"), r"symbols\.json: is missing"),
    "tokenizer missing": (removed("tokenizer/tokenizer.json"), r"tokenizer\.json: is missing"),
    "region cut": (cut(REGION, 5000), r"one-token\.pt2: is truncated: 5,000 bytes"),
    "weights empty": (cut(WEIGHTS, 0), r"weights\.safetensors: is truncated"),
    "weights longer": (
        lambda b: b.put(WEIGHTS, (b.folder / WEIGHTS).read_bytes() + b"\0"),
        "is longer than it was",
    ),
    "region flipped": (flipped(REGION), r"one-token\.pt2: was changed or exchanged"),
    "weights flipped": (flipped(WEIGHTS, -5), r"weights\.safetensors: was changed or exchanged"),
    "symbols flipped": (flipped("symbols.json"), r"symbols\.json: was changed"),
    "config flipped": (flipped("config.json"), r"config\.json: was changed"),
    "generation flipped": (flipped("generation.json"), r"generation\.json: was changed"),
    "tokenizer flipped": (flipped("tokenizer/tokenizer.json"), r"tokenizer\.json: was changed"),
    "regions swapped": (
        swapped(REGION, REGION.replace("layer_kind_0", "prologue")),
        r"\.pt2: is (truncated|longer)",
    ),
    "region a folder": (as_folder(REGION), "is not a plain file"),
    "region a pipe": (fifo(REGION), "is not a plain file"),
    # symbol table that the manifest vouches for
    "symbols no JSON": (
        lambda b: b.forge("symbols.json", b"{"),
        r"symbols\.json: is not valid JSON",
    ),
    "symbols of nothing": (
        lambda b: b.forge("symbols.json", b"{}"),
        r"symbols\.json: is no symbol table",
    ),
    "symbols a list": (
        lambda b: b.forge("symbols.json", b"[]"),
        r"symbols\.json: is no symbol table",
    ),
    "symbols of fewer layers": (
        symbols(lambda t: t["layers"].pop()),
        "has 3 layers, the manifest says 4",
    ),
    "symbols of no dtype": (
        symbols(lambda t: t["kv_specs"][0].update(dtype="load")),
        "has no usable slot for layer 0",
    ),
    "symbols of absurd slots": (
        symbols(lambda t: t["kv_specs"][1].update(heads=10**9)),
        "has no usable slot for layer 1",
    ),
    "symbols of other slots": (
        symbols(lambda t: t["kv_specs"][1].update(heads=4)),
        "a slot .* was not compiled for",
    ),
    "symbols with code": (
        symbols(
            lambda t: t["bodies"]["layer_kind_0"]["operands"][0].update(
                size=["__import__('os')"] * 3
            )
        ),
        "malformed sizes",
    ),
    "symbols with a role": (
        symbols(lambda t: t["bodies"]["prologue"]["operands"][0].update(role="hook")),
        "is a 'hook'",
    ),
    "symbols with a weight of sizes": (
        symbols(lambda t: t["bodies"]["epilogue"]["operands"][1].update(size=["B"])),
        "malformed sizes",
    ),
    "symbols without a body": (
        symbols(lambda t: t["layers"][0].update(target="gone")),
        "a call of 'gone' that has no body",
    ),
    "symbols with odd sides": (
        symbols(lambda t: t["layers"][0].update(sides=[-1, 3, 4, 5])),
        "takes side values",
    ),
    "symbols with fewer sides": (
        symbols(lambda t: t["layers"][0].update(sides=[3])),
        "takes 1 side values where",
    ),
    "symbols with fewer weights": (
        symbols(lambda t: t["layers"][2]["weights"].pop()),
        "takes 8 weights where its body takes 9",
    ),
    "symbols with a weight of a number": (
        symbols(lambda t: t["epilogue"].update(weights=[1, 2])),
        "takes 2 weights",
    ),
    "symbols with strides": (
        symbols(lambda t: t["bodies"]["epilogue"]["operands"][2].update(stride=["64", "1"])),
        "leave gaps or overlap",
    ),
    "symbols with an absurd weight": (
        symbols(lambda t: t["bodies"]["epilogue"]["operands"][2].update(size=["9" * 14, "32"])),
        r"takes float32 \(9{14}, 32\)",
    ),
    # weights that the manifest vouches for
    "weights no safetensors": (
        lambda b: b.forge(WEIGHTS, b"PK\3\4" * 100),
        r"weights\.safetensors: is no safetensors file",
    ),
    "weights a pickle": (
        lambda b: b.forge(WEIGHTS, b"\x80\x04cos\nsystem\n."),
        r"is no safetensors file",
    ),
    "weights short of one": (
        weights(lambda t: t.pop("lm_head.weight")),
        "holds no tensor 'lm_head.weight'",
    ),
    "weights with one more": (
        weights(lambda t: t.update(more=torch.zeros(2))),
        "holds a tensor 'more' that nothing takes",
    ),
    "weights of other sizes": (
        weights(lambda t: t.update({"lm_head.weight": torch.zeros(99, 32)})),
        r"holds lm_head\.weight as F32 \(99, 32\)",
    ),
    "weights of another dtype": (
        weights(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()})),
        r"holds lm_head\.weight as F16",
    ),
    # settings that the manifest vouches for
    "config a list": (lambda b: b.forge("config.json", b"[]"), r"config\.json: is no JSON object"),
    "config of another depth": (
        settings("config.json", num_hidden_layers=5),
        r"says 4 layers, config\.json 5",
    ),
    "config of no depth": (
        settings("config.json", num_hidden_layers="4"),
        "has no whole number num_hidden_layers",
    ),
    "config of an encoder": (
        settings("config.json", is_encoder_decoder=True),
        r"config\.json: is that of an encoder-decoder",
    ),
    "config of no name": (
        settings("config.json", architectures=[]),
        r"config\.json: names no architecture",
    ),
    "generation a number": (
        lambda b: b.forge("generation.json", b"1"),
        r"generation\.json: is no JSON object",
    ),
    "generation of nonsense": (
        settings("generation.json", max_new_tokens=-3),
        r"generation\.json: has no generation defaults",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_damaged_or_made_up_is_refused(
    name: str, mutable: Mutable, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, reason = MUTATIONS[name]
    check_refused(mutate, reason, bundle=mutable, monkeypatch=monkeypatch)


def test_without_mutations_the_bundle_loads(mutable: Mutable) -> None:
    mutable.sign(mutable.manifest())
    mutable.forge("config.json", (mutable.folder / "config.json").read_bytes())
    symbols(lambda table: None)(mutable)
    weights(lambda tensors: None)(mutable)
    assert len(load_bundle(mutable.folder).regions.records) == 7
    mutable.put("notes.txt", b"what the manifest does not name is not looked at")
    assert load_bundle(str(mutable.folder)).folder == mutable.folder


def test_the_expected_fingerprint_tells_bundles_apart(mutable: Mutable) -> None:
    own = verify_bundle(mutable.folder).fingerprint
    weights(lambda t: t["lm_head.weight"].mul_(2))(mutable)
    other = verify_bundle(mutable.folder).fingerprint
    assert other != own
    for known in (own, "something"):
        with pytest.raises(
            BundleError, match=f"has fingerprint {other}, not {known}; load the bundle you mean"
        ):
            load_bundle(mutable.folder, fingerprint=known)
    load_bundle(mutable.folder, fingerprint=other)


def test_a_package_that_does_not_load_is_an_error_that_names_it(mutable: Mutable) -> None:
    """The manifest vouches for it, so it is opened; torch refuses it."""
    mutable.forge(REGION, b"PK\3\4 no package")
    with pytest.raises(BundleError, match=r"one-token\.pt2: cannot be loaded: "):
        load_bundle(mutable.folder)


def test_a_region_exchanged_after_it_was_hashed_is_not_opened(
    mutable: Mutable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is opened is a private copy, made while it was hashed, and removed when it is loaded."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    def meddle(*args: Any, **kwargs: Any) -> Any:
        mutable.put(REGION, b"PK\3\4 no package")
        return load_weights(*args, **kwargs)

    monkeypatch.setattr("polar_fx.bundle.loader.load_weights", meddle)
    assert len(load_bundle(mutable.folder).regions.records) == 7
    assert not list((tmp_path / "temporary").glob("polar_fx-*"))

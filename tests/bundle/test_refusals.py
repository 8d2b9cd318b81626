"""Bundles that are damaged, foreign or made up are refused: with the file, the reason and a remedy,
before anything is loaded.
"""

import json
from pathlib import Path

import pytest

from damaged_bundles import (
    REGION,
    WEIGHTS,
    Mutation,
    again,
    as_folder,
    check_refused,
    cut,
    edit,
    field,
    fifo,
    file,
    linked,
    removed,
    sparse,
    text,
)
from polar_fx.bundle import BundleError, load_bundle, verify_bundle
from polar_fx.bundle.manifest import FORMAT
from tiny_bundles import Mutable


def without_checksum(bundle: Mutable) -> None:
    fields = bundle.manifest()
    del fields["checksum"]
    bundle.put("manifest.json", json.dumps(fields).encode())


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    # the manifest as a file
    "manifest missing": (
        removed("manifest.json"),
        r"manifest\.json: is missing: this is no bundle",
    ),
    "manifest empty": (text(""), r"manifest\.json: is not valid JSON"),
    "manifest no JSON": (text("programs: identity"), "is not valid JSON"),
    "manifest cut": (cut("manifest.json", 900), "is not valid JSON"),
    "manifest no UTF-8": (text(b'{"a": "\xff"}'), "is not valid JSON"),
    "manifest a list": (text("[]"), "has no format version"),
    "manifest null": (text("null"), "has no format version"),
    "manifest too deep": (text("[" * 100_000), "is not valid JSON"),
    "manifest a number of many digits": (
        text('{"polar_fx_bundle": ' + "9" * 10_000 + "}"),
        "is not valid JSON",
    ),
    "manifest NaN": (text('{"polar_fx_bundle": NaN}'), "NaN is no JSON number"),
    "manifest a name twice": (
        text('{"polar_fx_bundle": 1, "polar_fx_bundle": 1}'),
        "'polar_fx_bundle' is there twice",
    ),
    "manifest enormous": (sparse("manifest.json", 1 << 40), "and such a file has at most"),
    "manifest a link": (linked("manifest.json"), r"manifest\.json: is a symbolic link"),
    "manifest a folder": (as_folder("manifest.json"), "is not a plain file"),
    "manifest a pipe": (fifo("manifest.json"), "is not a plain file"),
    "manifest of another kind": (text('{"version": 1}'), "it is not the manifest of a bundle"),
    # version and checksum
    "format newer": (
        field("polar_fx_bundle", FORMAT + 1),
        f"has format {FORMAT + 1}, and this polar_fx reads formats up to {FORMAT}; update polar_fx",
    ),
    "format zero": (field("polar_fx_bundle", 0), "has no format version"),
    "format text": (field("polar_fx_bundle", "1"), "has no format version"),
    "format true": (field("polar_fx_bundle", True), "has no format version"),
    "format 1.0": (field("polar_fx_bundle", 1.0), "has no format version"),
    "edited": (
        lambda b: b.put(
            "manifest.json", json.dumps({**b.manifest(), "programs": ["skip 2"]}).encode()
        ),
        "was edited",
    ),
    "checksum of another": (
        lambda b: b.put(
            "manifest.json", json.dumps({**b.manifest(), "checksum": "0" * 64}).encode()
        ),
        "its checksum does not fit",
    ),
    "checksum malformed": (
        lambda b: b.put("manifest.json", json.dumps({**b.manifest(), "checksum": "abc"}).encode()),
        "checksum is malformed",
    ),
    "checksum missing": (without_checksum, "checksum is missing"),
    "a number beyond all": (
        lambda b: b.put(
            "manifest.json",
            (b.folder / "manifest.json").read_bytes().replace(b'"depth": 4', b'"depth": 1e999'),
        ),
        "holds a number that is none",
    ),
    "a lone surrogate": (field("created", "\ud800"), "created is malformed"),
    "a terminal's commands": (field("model.name", "\x1b[2J"), r"model\.name is malformed"),
    # fields
    "unknown field": (field("hooks", ["rm"]), "hooks is not a field of this format"),
    "unknown field inside": (
        field("model.code", "x"),
        r"model\.code is not a field of this format",
    ),
    "field missing": (edit(lambda m: m.pop("limits")), "limits is missing"),
    "field missing inside": (edit(lambda m: m["target"].pop("torch")), r"target\.torch is missing"),
    "section a list": (field("model", []), "model must be an object"),
    "depth text": (field("model.depth", "4"), r"model\.depth must be a whole number, got '4'"),
    "depth 4.0": (field("model.depth", 4.0), r"model\.depth must be a whole number"),
    "depth true": (field("model.depth", True), r"model\.depth must be a whole number"),
    "depth null": (field("model.depth", None), r"model\.depth must be a whole number"),
    "depth zero": (field("model.depth", 0), r"model\.depth is 0, outside"),
    "depth absurd": (field("model.depth", 10**9), r"model\.depth is 1000000000, outside"),
    "depth beyond all": (
        field("model.depth", 10**4000),
        r"model\.depth is a number beyond 64 bits",
    ),
    "dtype an expression": (field("model.dtype", "float32()"), r"model\.dtype is malformed"),
    "dtype of another": (
        field("model.dtype", "bfloat16"),
        "has weights of other dtypes than bfloat16",
    ),
    "name a number": (field("model.name", 5), r"model\.name must be text"),
    "name endless": (field("model.name", "x" * 300), r"model\.name has 300 characters"),
    "vocabulary of none": (field("model.vocab_size", 0), r"model\.vocab_size is 0"),
    "vocabulary beyond the table": (
        field("model.vocab_size", 101),
        r"symbols\.json: has no table of 101 token ids",
    ),
    "length zero": (field("limits.max_length", 0), r"limits\.max_length is 0"),
    "length absurd": (
        field("limits.max_length", 10**12),
        r"limits\.max_length is 1000000000000, outside",
    ),
    "columns too few": (field("limits.kv_length", 63), r"limits\.kv_length is 63, outside"),
    "columns another": (
        field("limits.kv_length", 80),
        r"was compiled for 80 KV columns, and this polar_fx allocates 64",
    ),
    "columns of no region": (
        edit(lambda m: m["limits"].update(max_length=79, kv_length=80)),
        r"does not name region \S+ for B=1 \S+ L=80",
    ),
    "chunk zero": (field("limits.prefill_chunk", 0), r"limits\.prefill_chunk is 0"),
    "rows a number": (field("limits.many_rows", 1), r"limits\.many_rows must be true or false"),
    "rows not there": (field("limits.many_rows", True), r"does not name region \S+ for B=2\+"),
    "threads negative": (field("target.threads", -1), r"target\.threads is -1"),
    "fingerprint malformed": (
        field("fingerprints.graphs", "xyz"),
        r"fingerprints\.graphs is malformed",
    ),
    "fingerprint of another": (
        field("fingerprints.graphs", "0" * 64),
        r"symbols\.json: is not the table whose fingerprint",
    ),
    "ties a list": (field("ties", []), "ties must be an object"),
    "ties to numbers": (field("ties", {"a": 1}), "ties must map names"),
    "ties of a stranger": (
        field("ties", {"a": "lm_head.weight"}),
        "'a' under another name, and nothing takes that tensor",
    ),
    "ties to nothing": (
        field("ties", {"lm_head.weight": "gone"}),
        r"weights\.safetensors: holds no tensor 'gone'",
    ),
    # programs
    "no program": (field("programs", []), "programs has 0 entries"),
    "programs a text": (field("programs", "identity"), "programs must be a list"),
    "program a path": (field("programs", [[0, 1]]), "programs must hold text"),
    "program twice": (field("programs", ["skip 1", "skip 1"]), "holds 'skip 1' twice"),
    "program twice otherwise": (
        field("programs", ["skip 1", "0 2 3"]),
        "holds one program twice, as 'skip 1' and as '0 2 3'",
    ),
    "program of another depth": (field("programs", ["0-4 /5"]), "which is no program of 4 layers"),
    "program beyond the layers": (field("programs", ["0 4"]), "which is no program of 4 layers"),
    "program of nonsense": (field("programs", ["__import__('os')"]), "which is no program"),
    "program of too many steps": (
        field("programs", ["(((0-3)*999)*999)*999"]),
        "which is no program",
    ),
    "program endless": (field("programs", ["0 " * 100_000]), "at most 65,536 characters"),
    "program of odd damping": (field("programs", ["(0-3)*2@7"]), "which is no program"),
    # where the machine differs
    "device": (
        field("target.device", "tpu"),
        r"for device 'tpu'; this polar_fx loads those for 'cpu' and 'cuda'",
    ),
    "no GPU": (field("target.device", "cuda"), r"for an NVIDIA GPU, and torch sees none here"),
    "processor": (
        field("target.processor", "Linux aarch64 SVE 00000000"),
        "for processor 'Linux aarch64 .* may be missing here",
    ),
    "torch": (
        field("target.torch", "2.12.0 abc"),
        r"for torch 2\.12\.0 abc, .*; install torch 2\.12\.0",
    ),
    "backend": (field("target.backend", "tensorrt"), "names backend 'tensorrt'"),
    # paths
    "path absolute": (file(REGION, path="/etc/passwd.pt2"), "path is absolute"),
    "path of a drive": (file(REGION, path="C:/x.pt2"), "path is absolute"),
    "path out": (file(REGION, path="../x.pt2"), "path leaves the bundle's folder"),
    "path out and in": (
        file(REGION, path="regions/../../bundle/regions/x.pt2"),
        "path leaves the bundle's folder",
    ),
    "path out by backslashes": (
        file(REGION, path="regions\\..\\x.pt2"),
        "path leaves the bundle's folder",
    ),
    "path empty": (file(REGION, path=""), "path is not a plain relative path"),
    "path hidden": (file(REGION, path="regions/.x.pt2"), "path is not a plain relative path"),
    "path of dots": (file(REGION, path="./regions/x.pt2"), "path is not a plain relative path"),
    "path with a null": (file(REGION, path="regions/x\0.pt2"), "path is malformed"),
    "path too deep": (
        file(REGION, path="regions/a/b/c/d/x.pt2"),
        "path is not a plain relative path",
    ),
    "path twice": (again(REGION), r"names 'regions/layer_kind_0\S+' a second time"),
    "path twice but for case": (
        again(REGION, path=REGION.replace("layer", "Layer")),
        "a second time",
    ),
    "path a number": (file(REGION, path=7), "path must be text"),
    "path of code": (
        again("config.json", path="evil.py"),
        "names 'evil.py', which has no place in a bundle",
    ),
    "path of a tokenizer's code": (
        again("config.json", path="tokenizer/tokenization.py"),
        "has no place in a bundle",
    ),
    "path of a region elsewhere": (
        file(REGION, path="tokenizer/region.pt2"),
        "has no place in a bundle",
    ),
    "region a link": (
        linked(REGION),
        r"one-token\.pt2: is a symbolic link, which could lead out of the bundle",
    ),
    "folder a link": (linked("regions"), r"regions: is a symbolic link"),
    "weights a link": (linked(WEIGHTS), r"weights\.safetensors: is a symbolic link"),
    # entries
    "files an object": (field("files", {}), "files must be a list"),
    "files none": (field("files", []), "files has 0 entries"),
    "file a text": (field("files", ["weights.safetensors"]), r"files\[0\] must be an object"),
    "file unknown field": (file(WEIGHTS, pickle=True), r"files\[0\]\.pickle is not a field"),
    "file without sha256": (file(WEIGHTS, sha256=None), r"files\[0\]\.sha256 is missing"),
    "sha256 malformed": (file(WEIGHTS, sha256="0" * 63), "sha256 is malformed"),
    "sha256 of another": (
        file(WEIGHTS, sha256="0" * 64),
        r"weights\.safetensors: was changed or exchanged",
    ),
    "bytes none": (file(WEIGHTS, bytes=0), "bytes is 0"),
    "bytes negative": (file(WEIGHTS, bytes=-1), "bytes is -1"),
    "bytes absurd": (file(WEIGHTS, bytes=1 << 60), r"bytes is \d+, outside"),
    "bytes of settings absurd": (file("config.json", bytes=1 << 40), r"bytes is \d+, outside"),
    "bytes a fraction": (file(WEIGHTS, bytes=1.5), "bytes must be a whole number"),
    "no weights": (
        edit(lambda m: m.update(files=m["files"][1:])),
        r"does not name weights\.safetensors",
    ),
    "region not named": (
        edit(lambda m: m.update(files=[f for f in m["files"] if f["path"] != REGION])),
        "does not name region",
    ),
    "region without shapes": (file(REGION, shapes=None), "shapes is missing"),
    "region of odd shapes": (file(REGION, shapes="B=7 T=1 L=64"), "shapes is no class of shapes"),
    "region of another length": (
        file(REGION, shapes="B=1 T=1 L=128"),
        "does not name region layer_kind_0 for B=1 T=1 L=any",
    ),
    "region of another body": (
        file(REGION, region="layer_kind_7"),
        "does not name region layer_kind_0",
    ),
    "region an expression": (file(REGION, region="a;b"), "region is malformed"),
    "region twice": (file(REGION, region="prologue"), "names one region twice"),
    "region nobody calls": (
        lambda b: (
            (b.folder / "regions/x.pt2").hardlink_to(b.folder / REGION),
            again(REGION, path="regions/x.pt2", region="layer_kind_1")(b),
        )[0],
        "names, though nothing calls it, region layer_kind_1",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_no_whole_bundle_for_this_machine_is_refused(
    name: str, mutable: Mutable, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, reason = MUTATIONS[name]
    check_refused(mutate, reason, bundle=mutable, monkeypatch=monkeypatch)


def test_a_bundle_for_another_machine_can_be_verified_here(mutable: Mutable) -> None:
    field("target.processor", "Linux aarch64 SVE 00000000")(mutable)
    assert verify_bundle(mutable.folder, target=False).processor == "Linux aarch64 SVE 00000000"
    with pytest.raises(BundleError, match="for processor"):
        verify_bundle(mutable.folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(
            BundleError, match="is not a folder; name the folder that polar_fx.export wrote"
        ):
            load_bundle(place)
    with pytest.raises(BundleError, match=r"manifest\.json: is missing: this is no bundle"):
        load_bundle(tmp_path)


def test_a_link_to_a_whole_bundle_is_followed(mutable: Mutable, tmp_path: Path) -> None:
    """Releases are often switched by one: what it names is checked like any folder."""
    (tmp_path / "current").symlink_to(mutable.folder)
    assert load_bundle(tmp_path / "current").folder == mutable.folder

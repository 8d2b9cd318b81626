"""`python -m polar_fx bundle`, and `run` with a bundle in the place of a model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from polar_fx.bundle import add_program, export, load_bundle, read_manifest
from polar_fx.cli import main
from tiny_bundles import Mutable, compiled_model
from tiny_models import prompts

SHOWN = ("0-3 /4", "0 2-3 /4", "0 (1-2)*2@0.5 3 /4")


def _json(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> dict[str, Any]:
    assert main(["bundle", *map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def _text(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    assert main(["bundle", *map(str, arguments)]) == status
    return capsys.readouterr().out


def test_show_prints_what_a_bundle_holds(
    whole_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(whole_bundle)
    text = _text(capsys, "show", whole_bundle)
    for words in (
        "4 layers, float32",
        "63 tokens a row, row by row",
        "7 compiled regions",
        manifest.processor,
        manifest.fingerprint,
    ):
        assert words in text
    assert re.findall(r"^  (.*)  \(\d+ steps\)$", text, re.MULTILINE) == list(SHOWN)
    shown = _json(capsys, "show", whole_bundle)
    assert shown["manifest"] == manifest.to_dict() and shown["fingerprint"] == manifest.fingerprint
    assert shown["bytes"] == manifest.num_bytes


def test_show_reads_the_manifest_alone(
    mutable: Mutable, capsys: pytest.CaptureFixture[str]
) -> None:
    mutable.put("weights.safetensors", b"")
    assert "3 programs, the first by default" in _text(capsys, "show", mutable.folder)
    assert main(["bundle", "show", str(mutable.folder.parent)]) == 2
    assert "this is no bundle" in capsys.readouterr().err


def test_verify_says_what_is_wrong_with_its_exit_status(
    mutable: Mutable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, fingerprint = mutable.folder, read_manifest(mutable.folder).fingerprint
    assert "whole, and for this machine" in _text(capsys, "verify", folder)
    assert "as it should be" in _text(capsys, "verify", folder, "--fingerprint", fingerprint)
    assert f"has fingerprint {fingerprint}, not abc" in _text(
        capsys, "verify", folder, "--fingerprint", "abc", status=1
    )

    manifest = mutable.manifest()
    mutable.sign(
        manifest | {"target": manifest["target"] | {"processor": "Linux aarch64 SVE 00000000"}}
    )
    assert "for processor 'Linux aarch64 SVE 00000000'" in _text(capsys, "verify", folder, status=1)
    assert "whole; " in _text(capsys, "verify", folder, "--any-target")

    mutable.put("config.json", b"{}")
    refused = _json(capsys, "verify", folder, "--any-target", status=1)
    assert refused["ok"] is False and refused["refused"]["file"].endswith("config.json")
    assert "is truncated" in refused["refused"]["reason"] and refused["refused"]["remedy"]


def test_programs_are_added_and_removed(
    mutable: Mutable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (row,) = mutable.folder, prompts(5)
    (tmp_path / "menu.txt").write_text("skip 2\n# a comment\nskip 1  # there already\n")
    added = _json(capsys, "add", folder, tmp_path / "menu.txt", "repeat 0", "skip 2")
    assert added["added"] == ["0-1 3 /4", "(0)*2 1-3 /4"] and added["removed"] == []
    load_bundle(folder).forward(row[None], program="repeat 0")

    text = _text(capsys, "add", folder, "skip 3", "skip 2", "--default")
    assert "+ 0-2 /4\n" in text and text.endswith("6 programs, by default 0-2 /4\n")
    removed = _json(capsys, "remove", folder, "skip 3", "identity")
    assert (
        removed["removed"] == ["0-2 /4", "0-3 /4"]
        and removed["manifest"]["programs"][0] == SHOWN[1]
    )
    assert (
        load_bundle(folder).manifest.fingerprint == added["fingerprint"] == removed["fingerprint"]
    )


def test_what_cannot_be_changed_leaves_the_manifest_alone(
    mutable: Mutable, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (mutable.folder / "manifest.json").read_bytes()
    for arguments, words in (
        (("add", "skip 2", "skip 9"), "9"),
        (("add",), "name the programs to add"),
        (("remove", "skip 1", "skip 2"), "holds no program 0-1 3 /4; `bundle show` lists"),
        (("remove", *SHOWN), "would hold no program any more; add another one first"),
        (
            ("remove", "skip 1", "--default"),
            "--default belongs to `bundle add`, not to `bundle remove`",
        ),
        (("show", "skip 1"), "programs belong to `bundle add and remove`, not to `bundle show`"),
        (("add", "skip 2", "--any-target"), "--any-target belongs to `bundle verify`"),
        (("show", "--fingerprint", "abc"), "--fingerprint belongs to `bundle verify`"),
    ):
        assert main(["bundle", arguments[0], str(mutable.folder), *arguments[1:]]) == 2
        output = capsys.readouterr()
        assert words in output.err and output.out == "", arguments
    assert (mutable.folder / "manifest.json").read_bytes() == text


def test_run_answers_from_a_bundle(
    mutable: Mutable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mutable.folder
    add_program(folder, "skip 1", default=True)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(
            [
                "run",
                "--model",
                str(folder),
                "--prompt",
                "w5 w17 w3",
                "--max-new-tokens",
                "4",
                "--json",
                *arguments,
            ]
        )
        output = capsys.readouterr()
        return status, output.out, output.err

    status, out, _ = run()
    result = json.loads(out)
    bundle = load_bundle(folder)
    tokens = bundle.generate(
        bundle.tokenizer("w5 w17 w3", return_tensors="pt").input_ids,
        max_new_tokens=4,
        do_sample=False,
    )
    assert status == 0 and result["results"][0]["text"] == bundle.tokenizer.decode(
        tokens[0, 3:], skip_special_tokens=True
    )
    assert [r["program"] for r in result["results"]] == [SHOWN[1]], "the bundle's default program"
    assert (result["max_length"], result["backend"]) == (63, "aot_inductor")
    assert [
        r["steps"]
        for r in json.loads(run("--program", "identity", "--program", "skip 1")[1])["results"]
    ] == [4, 3]

    for arguments, words in (
        (("--program", "skip 2"), "is not among the 3 programs of the bundle"),
        (("--max-new-tokens", "62"), "the bundle's length of 63 is too short"),
        (("--dtype", "float32"), "--dtype is for models"),
        (("--backend", "eager"), "--backend is for models"),
        (("--max-length", "63"), "--max-length is for models"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and words in err, arguments
    export(compiled_model(), tmp_path / "without")
    assert main(["run", "--model", str(tmp_path / "without"), "--prompt", "w1"]) == 2
    assert "holds no tokenizer to read a prompt with" in capsys.readouterr().err

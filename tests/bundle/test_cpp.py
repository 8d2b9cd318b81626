"""The C++ runner: built against the installed torch, it generates from a bundle what Python does,
and refuses what it must.

Shape legend: T tokens.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache

from cpp_runner import comma, cpp_tokens, python_tokens, run_cpp
from plain_loop import plain_logits
from polar_fx.backends import AotInductorBackend
from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.bundle import BundledModel, export, load_bundle, read_manifest
from polar_fx.bundle.contents import weight_operands
from polar_fx.bundle.manifest import FORMAT, write_manifest
from polar_fx.compiled import compile
from polar_fx.errors import ProgramError
from polar_fx.passes import Pass
from polar_fx.program import Program
from polar_fx.quantized import quantize_weights
from tiny_bundles import compiled_hybrid, hybrid
from tiny_models import make, prompts

DEPTH, LENGTH, CHUNK = 4, 63, 8
PROGRAMS = ("identity", "skip 1", "0-1 (2-3)*2", "0 (1-2)*2@0.5 3", "[(0-1)*2@0.25 3]@0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose prompts are prefilled in parts, with a weight under two names that is not laid
    out row by row.
    """
    model = make("llama")
    weight = torch.nn.Parameter(model.get_input_embeddings().weight.data.t().contiguous().t())  # type: ignore[union-attr]
    model.get_input_embeddings().weight = weight  # type: ignore[assignment]
    model.get_output_embeddings().weight = torch.nn.Parameter(weight.data)  # type: ignore[assignment]
    compiled = compile(model, "aot_inductor", max_length=LENGTH, prefill_chunk=CHUNK)
    place = tmp_path_factory.mktemp("bundles") / "bundle"
    manifest = export(compiled, place, PROGRAMS)
    (tied,) = manifest.ties
    assert weight_operands(compiled.library.table)[tied].stride == ("1", "100")
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> BundledModel:
    return load_bundle(folder, any_program=True)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A bundle of one's own, to be damaged."""
    return shutil.copytree(folder, tmp_path / "bundle")


# one token, two, one part, one part and a single token, three parts
@pytest.mark.parametrize("num_prompt", [1, 2, CHUNK, CHUNK + 1, 2 * CHUNK + 4])
def test_greedy_tokens_are_those_of_python(
    runner: Path, folder: Path, bundle: BundledModel, num_prompt: int
) -> None:
    prompt = prompts(num_prompt)[0].tolist()
    answers = set()
    for program in PROGRAMS:
        text = str(Program.parse(program, DEPTH))
        got = cpp_tokens(runner, folder, "--program", text, "--tokens", comma(prompt), "--new", 12)
        assert got == python_tokens(bundle, program, prompt=prompt, new=12), text
        answers.add(tuple(got))
    assert len(answers) > 1, "programs answer differently, or this test would not see which one ran"
    without = cpp_tokens(runner, folder, "--tokens", comma(prompt), "--new", 12)
    assert without == python_tokens(bundle, "identity", prompt=prompt, new=12), (
        "the first program is the default one"
    )


def test_a_row_may_be_filled_to_its_end(runner: Path, folder: Path, bundle: BundledModel) -> None:
    prompt = prompts(LENGTH - 2)[0].tolist()
    assert cpp_tokens(runner, folder, "--tokens", comma(prompt), "--new", 3) == python_tokens(
        bundle, "identity", prompt=prompt, new=3
    )
    done = run_cpp(runner, folder, "--tokens", comma(prompt), "--new", 4)
    assert (
        done.returncode == 2
        and "a prompt of 61 tokens and 4 new ones exceed the 63 that the bundle holds"
        in done.stderr
    )


def test_it_stops_where_the_text_ends(runner: Path, copied: Path, bundle: BundledModel) -> None:
    prompt = prompts(5)[0].tolist()
    tokens = python_tokens(bundle, "identity", prompt=prompt, new=12)
    _exchange(copied, "generation.json", text=json.dumps({"eos_token_id": [99, tokens[4]]}))
    got = cpp_tokens(runner, copied, "--tokens", comma(prompt), "--new", 12)
    assert (
        got
        == tokens[: tokens.index(tokens[4]) + 1]
        == python_tokens(load_bundle(copied), "identity", prompt=prompt, new=12)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(Cache, "get_conv_state"), reason="caches of this transformers do not tell states"
)
@pytest.mark.parametrize("passes", [REGION_PASSES, ()], ids=["kernels", "no passes"])
def test_states_and_experts_run(passes: Sequence[Pass], runner: Path, tmp_path: Path) -> None:
    """Programs that end in a layer with a state, and in one cut to its keys and values. Without
    passes, experts call an operator that transformers registers in Python.
    """
    compiled = compiled_hybrid(AotInductorBackend(passes=passes))
    programs = ("identity", "(0)*2@0.5 1 0")
    export(compiled, tmp_path / "bundle", programs)
    loaded, source = load_bundle(tmp_path / "bundle"), hybrid()
    for text, row in zip(programs, prompts(2 * CHUNK + 4, CHUNK + 1), strict=True):
        program = compiled.resolve(text)
        logits = loaded.forward(row[None], program=program)[0]
        want = plain_logits(source, program, row=row)
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
        arguments = ("--tokens", comma(row.tolist()), "--new", 8, "--program", str(program))
        got = cpp_tokens(runner, tmp_path / "bundle", *arguments)
        assert got == python_tokens(loaded, text, prompt=row.tolist(), new=8)


@pytest.mark.slow
def test_weights_as_integers_run(runner: Path, tmp_path: Path) -> None:
    model = quantize_weights(make("llama", hidden_size=64, intermediate_size=128), "int4")
    export(compile(model, "aot_inductor", max_length=31), tmp_path / "bundle", ["identity"])
    want = python_tokens(load_bundle(tmp_path / "bundle"), "identity", prompt=[5, 7, 9], new=8)
    arguments = (tmp_path / "bundle", "--tokens", "5,7,9", "--new", 8)
    assert cpp_tokens(runner, *arguments) == want


def test_a_row_that_would_be_computed_anew_is_refused(
    runner: Path, copied: Path, bundle: BundledModel
) -> None:
    values = json.loads((copied / "manifest.json").read_text())
    values["limits"]["frequency_switch"] = 8
    (copied / "manifest.json").write_text(json.dumps(values))
    done = run_cpp(runner, copied, "--tokens", "1,2,3,4", "--new", 6)
    assert done.returncode == 2 and "past 8 tokens this model computes a whole row" in done.stderr
    for prompt, new in (([1, 2, 3, 4], 5), (list(range(1, 10)), 4)):
        got = cpp_tokens(runner, copied, "--tokens", comma(prompt), "--new", new)
        assert got == python_tokens(bundle, "identity", prompt=prompt, new=new)


def _exchange(place: Path, name: str, *, text: str) -> None:
    """Write another file, and what the manifest says of it."""
    (place / name).write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest = read_manifest(place)
    files = [
        replace(f, num_bytes=len(text), sha256=digest) if f.path == name else f
        for f in manifest.files
    ]
    write_manifest(place, replace(manifest, files=tuple(files)))


# ----------------------------------------------------------------------------------------- programs


def _random_program(pick: random.Random) -> Program:
    """Runs of layers, repeated and damped in one another."""
    text = ""
    for _ in range(pick.randint(1, 4)):
        part = " ".join(str(pick.randrange(DEPTH)) for _ in range(pick.randint(1, 3)))
        for _ in range(pick.randint(0, 2)):
            damping = f"@{pick.choice((0.1, 0.5, 1.0, 1e-5, 1 / 3))!r}"
            part = pick.choice(
                (
                    f"({part})*{pick.randint(2, 3)}",
                    f"({part})*2{damping}",
                    f"[{part}]{damping}",
                    f"3 {part}",
                )
            )
        text = f"({text} {part})*2@0.75" if pick.random() < 0.2 else f"{text} {part}"
    return Program.parse(text, DEPTH)


SPELLINGS = (
    "identity",
    " identity /4 ",
    "0,1, 2-3",
    "( 0 - 1 ) * 2 @ .5 3/4",
    "(0)*2[1]@1",
    "[[1]@0.5]@0.5",
    "((0)*2@0.3)*2@0.7",
)


def test_programs_are_read_as_python_reads_them(runner: Path, folder: Path) -> None:
    pick = random.Random(0)
    for text in (*SPELLINGS, *(str(_random_program(pick)) for _ in range(20))):
        done = run_cpp(runner, folder, "--steps", "--any-program", "--program", text)
        assert done.returncode == 0, done.stderr
        schedule = Program.parse(text, DEPTH).schedule()
        for line, step in zip(done.stdout.splitlines(), schedule, strict=True):
            layer, opens, *closes = map(float, line.split())
            assert (layer, opens, tuple(closes)) == (step.layer, step.opens, step.closes), text


MALFORMED = (
    "",
    "/4",
    "4",
    "0-4",
    "-1",
    "2-1",
    "0 /5",
    "0 /4 1",
    "0,",
    ",0",
    "(0)",
    "(0)*1",
    "(0)*2@0",
    "(0)*2@1.5",
    "(0)*2@nan",
    "[0]",
    "[0]*2",
    "(0]*2",
    "(0",
    "0)*2",
    "()*2",
    "0.5",
    "1e0",
    "identity 0",
    "(0)*2.5",
    "(0-3)*1025",
    "(0)*99999999999",
    "0x1",
    "0;1",
)


def test_malformed_programs_are_refused_as_in_python(runner: Path, folder: Path) -> None:
    for text in MALFORMED:
        with pytest.raises(ProgramError):
            Program.parse(text, DEPTH)
        done = run_cpp(runner, folder, "--steps", "--any-program", "--program", text)
        assert done.returncode == 2 and done.stderr.startswith(
            f"polar_run: program '{text}': column "
        ), text
    done = run_cpp(runner, folder, "--program", "0-4 6-29 /30", "--tokens", "1")
    assert (
        done.returncode == 2
        and "column 10: the program is for 30 layers, the bundle has 4" in done.stderr
    )


def test_only_the_programs_of_the_manifest_run_unless_asked(
    runner: Path, folder: Path, bundle: BundledModel
) -> None:
    done = run_cpp(runner, folder, "--program", "3 2 1", "--tokens", "5,6")
    assert (
        done.returncode == 2
        and "is not among the 5 programs of the bundle; add it with" in done.stderr
    )
    got = cpp_tokens(
        runner, folder, "--program", "3 2 1", "--any-program", "--tokens", "5,6", "--new", 4
    )
    assert got == python_tokens(bundle, "3 2 1", prompt=[5, 6], new=4)


# ----------------------------------------------------------------------------------------- refusals


def test_arguments_that_make_no_sense_are_refused(runner: Path, folder: Path) -> None:
    for arguments, words in (
        ((), "BUNDLE: name the folder of a bundle"),
        ((folder,), "--tokens: a prompt needs at least one token"),
        ((folder, "--tokens", "1,,2"), "'' is no whole number"),
        ((folder, "--tokens", "1,x"), "'x' is no whole number"),
        ((folder, "--tokens", "100"), "100 is outside the vocabulary 0..99"),
        ((folder, "--tokens", "-1"), "-1 is outside the vocabulary"),
        ((folder, "--tokens"), "--tokens: needs a value"),
        ((folder, "--tokens", "1", "--new", "0"), "--new: give at least 1"),
        ((folder, "--tokens", "1", "--new", "9223372036854775807"), "exceed the 63"),
        ((folder, "--beams", "2"), "--beams: is no option"),
        ((folder.parent / "nowhere", "--tokens", "1"), "nowhere: is not a folder"),
        ((folder.parent, "--tokens", "1"), "manifest.json: is missing"),
    ):
        done = run_cpp(runner, *arguments)
        assert done.returncode == 2 and words in done.stderr and not done.stdout, (
            arguments,
            done.stderr,
        )
    assert run_cpp(runner, "--help").stdout.startswith("usage: polar_run BUNDLE --tokens 1,2,3")


def _in_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        values = json.loads((place / "manifest.json").read_text())
        change(values)
        (place / "manifest.json").write_text(json.dumps(values))

    return damage


def _flip(place: Path, name: str) -> None:
    text = bytearray((place / name).read_bytes())
    text[-1] ^= 1
    (place / name).write_bytes(text)


def _a_region(place: Path) -> str:
    return next(p for p in sorted((place / "regions").iterdir())).relative_to(place).as_posix()


def _link(place: Path) -> None:
    (place / "symbols.json").rename(place.parent / "symbols.json")
    (place / "symbols.json").symlink_to(place.parent / "symbols.json")


def _no_layers(place: Path) -> None:
    table = json.loads((place / "symbols.json").read_text())
    _exchange(place, "symbols.json", text=json.dumps({**table, "layers": [], "kv_specs": []}))


def _wider(place: Path) -> None:
    table = json.loads((place / "symbols.json").read_text())
    operands = table["bodies"][table["layers"][-1]["target"]]["operands"]
    next(o for o in operands if o["role"] == "weight")["size"][0] = "33"
    _exchange(place, "symbols.json", text=json.dumps(table))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a newer format": (
        _in_manifest(lambda m: m.update(polar_fx_bundle=FORMAT + 1)),
        f"manifest.json: has format {FORMAT + 1}, and this runner reads formats up to {FORMAT}",
    ),
    "no manifest of a bundle": (_in_manifest(dict.clear), "manifest.json: has no format version"),
    "a manifest that ends early": (
        lambda p: (p / "manifest.json").write_text('{"polar_fx_bundle": 1,'),
        "manifest.json: is not valid JSON",
    ),
    "a missing field": (
        _in_manifest(lambda m: m.pop("limits")),
        'manifest.json: the field "limits" is missing',
    ),
    "another torch": (
        _in_manifest(lambda m: m["target"].update(torch="2.0 0")),
        "is of a bundle for torch '2.0 0', and this is",
    ),
    "another processor": (
        _in_manifest(lambda m: m["target"].update(processor="Linux")),
        "is of a bundle for processor 'Linux'",
    ),
    "another device": (
        _in_manifest(lambda m: m["target"].update(device="cuda")),
        "is of a bundle for device 'cuda'",
    ),
    "a path that leads out": (
        _in_manifest(
            lambda m: [f.update(path="../x") for f in m["files"] if f["path"] == "config.json"]
        ),
        "names a path ../x",
    ),
    "no weights": (
        lambda p: (p / "weights.safetensors").unlink(),
        "weights.safetensors: is missing",
    ),
    "no region": (lambda p: (p / _a_region(p)).unlink(), "epilogue"),
    "a truncated region": (
        lambda p: (p / _a_region(p)).write_bytes(b"PK"),
        "is truncated: 2 bytes, the manifest says",
    ),
    "a changed region": (lambda p: _flip(p, _a_region(p)), "was changed or exchanged"),
    "changed weights": (
        lambda p: _flip(p, "weights.safetensors"),
        "weights.safetensors: was changed or exchanged",
    ),
    "a link": (_link, "symbols.json: is a symbolic link"),
    "no weights file": (
        lambda p: _exchange(p, "weights.safetensors", text="x" * 64),
        "weights.safetensors: is no safetensors file",
    ),
    "a table of wider layers": (_wider, "in another size or dtype than the code takes"),
    "a table of another depth": (_no_layers, "symbols.json: it has 0 layers, the manifest says 4"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_bundles_that_are_damaged_or_made_for_elsewhere_are_refused(
    runner: Path, copied: Path, what: str
) -> None:
    damage, words = DAMAGE[what]
    damage(copied)
    done = run_cpp(runner, copied, "--tokens", "1,2", "--new", 2)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("polar_run: ") and words in done.stderr, done.stderr


def test_sizes_only_looks_at_sizes(runner: Path, copied: Path) -> None:
    _flip(copied, "config.json")  # which the runner does not read
    arguments = (copied, "--tokens", "1,2", "--new", 2)
    assert "config.json: was changed" in run_cpp(runner, *arguments).stderr
    assert len(cpp_tokens(runner, *arguments, "--sizes-only")) == 2
    (copied / "config.json").write_text("{}")
    assert "config.json: is truncated" in run_cpp(runner, *arguments, "--sizes-only").stderr

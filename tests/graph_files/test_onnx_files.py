"""Programs as ONNX files, run by onnxruntime: the interpreter's logits, the compiled model's
tokens, every weight once.

Shape legend: B batch, T tokens, L KV length, W tokens whose logits are asked for, V vocabulary.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import polar_fx.graph_files
from polar_fx.bundle import BundleError
from polar_fx.cli import export as command
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import CaptureError, InputError, ProgramError
from polar_fx.graph_files import export_onnx
from polar_fx.library import LayerLibrary
from polar_fx.program import Program
from several_attentions import double_logits, make_double
from slow_cases import some_slow
from streams import make_streams, streams_logits
from tiny_models import make, prompts, reference, run_rows

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")

# grouped heads; a sliding window, two kinds of layers and a tied head; learned positions and a tied
# head; experts
FAMILIES = ("gemma3_text", "gpt2", "mixtral")
TIED = ("gemma3_text", "gpt2")
PROGRAMS = {
    4: ("identity", "skip 1", "0 ((1)*2 2)*2 3", "0 (1-2)*2@0.5 3", "3 0"),
    3: ("identity", "skip 1", "((0)*2 1)*2 2", "0 (1-2)*2@0.5", "2 0"),
}


class Session:
    """One ONNX file, run as `LayerLibrary.interpret` runs a program."""

    def __init__(self, folder: Path, entry: dict[str, Any], *, library: LayerLibrary) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            str(folder / entry["file"]), options, providers=["CPUExecutionProvider"]
        )
        self.past = [i.name for i in self.session.get_inputs()][3:]
        self.present = [o.name for o in self.session.get_outputs()][1:]
        self.kv_specs = library.kv_specs

    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        *,
        logits_at: Tensor,
        slots: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Logits [B, W, V]; the slots hold what is present afterwards."""
        given = {"input_ids": ids, "positions": positions, "logits_at": logits_at}
        flat = [t for pair in slots for t in pair]
        given |= dict(zip(self.past, flat, strict=True))
        logits, *present = self.session.run(None, {name: t.numpy() for name, t in given.items()})
        for old, new in zip(flat, present, strict=True):
            old.copy_(torch.from_numpy(new))
        return torch.from_numpy(logits)

    def run_in_place(
        self, ids: Tensor, positions: Tensor, *, logits_at: Tensor, slots: Sequence[Any]
    ) -> Tensor:
        """The same with past and present in the same memory."""
        binding = self.session.io_binding()
        binding.bind_output("logits")
        for name, given in {
            "input_ids": ids,
            "positions": positions,
            "logits_at": logits_at,
        }.items():
            binding.bind_cpu_input(name, given.numpy())
        for past, present, slot in zip(self.past, self.present, slots, strict=True):
            binding.bind_ortvalue_input(past, slot)
            binding.bind_ortvalue_output(present, slot)
        self.session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[0].numpy())

    def interpret(
        self,
        program: Program,
        ids: Tensor,
        positions: Tensor,
        index: Tensor,
        slots: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        return self.run(
            ids, positions, logits_at=torch.arange(ids.shape[1]).expand(len(ids), -1), slots=slots
        )


@pytest.fixture(scope="module", params=some_slow(FAMILIES, ("gpt2", "mixtral")))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, CompiledModel, Path]:
    compiled = compile(make(request.param), "eager", max_length=31, cache=False)
    folder = tmp_path_factory.mktemp("onnx") / request.param
    export_onnx(compiled, folder, programs=PROGRAMS[compiled.depth])
    return request.param, compiled, folder


def _about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "programs.json").read_text())


@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_model(
    exported: tuple[str, CompiledModel, Path],
) -> None:
    """Ragged rows, prefilled and decoded; then greedy generation, one row."""
    family, compiled, folder = exported
    entries = _about(folder)["programs"]
    wanted = map(compiled.resolve, PROGRAMS[compiled.depth])
    assert [e["program"] for e in entries] == list(map(str, wanted))
    rows = prompts(13, 7, 10)  # longer than the window
    for entry in entries:
        program, session = (
            Program.parse(entry["program"]),
            Session(folder, entry, library=compiled.library),
        )
        got = run_rows(session, program, rows=rows, prefill=[11, 5, 10])  # type: ignore[arg-type]
        want = run_rows(compiled.library, program, rows=rows, prefill=[11, 5, 10])
        for one, two in zip(got, want, strict=True):
            assert (one - two).abs().max() < 1e-4
        if program == Program.identity(compiled.depth):
            for one, two in zip(got, reference(make(family), rows), strict=True):
                assert (one - two).abs().max() < 1e-3
        tokens = compiled.generate(
            rows[0][None], program=program, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert _greedy(session, rows[0], slots=entry["slots"], new_tokens=6) == tokens[0].tolist()


def _greedy(
    session: Session, prompt: Tensor, *, slots: list[dict[str, int]], new_tokens: int
) -> list[int]:
    sizes = [(1, s["heads"], 24, s[part]) for s in slots for part in ("key_size", "value_size")]
    past = [ort.OrtValue.ortvalue_from_numpy(torch.zeros(size).numpy()) for size in sizes]
    tokens, done = prompt.tolist(), 0
    for _ in range(new_tokens):
        ids = torch.tensor([tokens[done:]])
        positions = torch.arange(done, len(tokens))[None]
        logits = session.run_in_place(
            ids, positions, logits_at=torch.tensor([[ids.shape[1] - 1]]), slots=past
        )
        assert logits.shape[:2] == (1, 1)
        done = len(tokens)
        tokens.append(int(logits[0, 0].argmax()))
    return tokens


@pytest.mark.slow
@torch.no_grad()
def test_steps_may_keep_several_pairs_of_keys_and_values(tmp_path: Path) -> None:
    model, rows = make_double(2), prompts(13, 7)
    compiled = compile(model, "eager", max_length=31, cache=False)
    export_onnx(compiled, tmp_path / "onnx", programs=("identity", "0 (1)*2@0.5 0"))
    for entry in _about(tmp_path / "onnx")["programs"]:
        program = Program.parse(entry["program"])
        session: Any = Session(tmp_path / "onnx", entry, library=compiled.library)
        assert session.past[:4] == [
            f"past.0.{part}" for part in ("key", "value", "more_key_0", "more_key_1")
        ]
        for own, row in zip(
            run_rows(session, program, rows=rows, prefill=(11, 5)), rows, strict=True
        ):
            assert (own - double_logits(model, program, row=row)).abs().max() < 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_steps_may_hand_on_several_streams(tmp_path: Path) -> None:
    model, rows = make_streams(sparsity=0.0), prompts(13, 7)
    compiled = compile(model, "eager", max_length=31, cache=False)
    export_onnx(compiled, tmp_path / "onnx", programs=("identity", "0 1 (3)*2@0.5 2"))
    for entry in _about(tmp_path / "onnx")["programs"]:
        program = Program.parse(entry["program"])
        session: Any = Session(tmp_path / "onnx", entry, library=compiled.library)
        got = run_rows(session, program, rows=rows, prefill=(11, 5))
        for own, row in zip(got, rows, strict=True):
            assert (own - streams_logits(model, program, row=row)).abs().max() < 1e-3


@pytest.mark.slow
def test_an_operator_that_onnx_has_not_is_named_before_anything_is_written(tmp_path: Path) -> None:
    compiled = compile(make_streams(), "eager", max_length=31, cache=False)
    with pytest.raises(CaptureError, match="cannot export layer_kind_0 to ONNX: .*erf_inv"):
        export_onnx(compiled, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_every_weight_is_there_once_and_the_folder_tells_what_it_holds(
    exported: tuple[str, CompiledModel, Path],
) -> None:
    family, compiled, folder = exported
    about = _about(folder)
    files = [about["weights"], *about["programs"]]
    named = {file["file"] for file in files}
    assert {path.name for path in folder.iterdir()} == {*named, "programs.json"}
    for file in files:
        content = (folder / file["file"]).read_bytes()
        assert (
            file["bytes"] == len(content) and file["sha256"] == hashlib.sha256(content).hexdigest()
        )
    tensors = {t.data_ptr(): t.nbytes for t in compiled.library.tensors.values()}
    start, head = compiled.library.prologue, compiled.library.epilogue
    assert any(a is b for a in start.weights for b in head.weights) == (family in TIED)
    assert 0 <= about["weights"]["bytes"] - sum(tensors.values()) < 16_384, (
        "no more than a header beside the tensors"
    )
    assert about["fingerprint"] == compiled.library.model_fingerprint
    for entry in about["programs"]:
        onnx.checker.check_model(str(folder / entry["file"]))
        model = onnx.load(folder / entry["file"], load_external_data=False)
        table, path = compiled.library.table, compiled.resolve(entry["program"]).path
        calls = (table.prologue, *(table.layers[layer] for layer in path), table.epilogue)
        taken = {name for call in calls for name in call.weights}
        assert sorted(t.name for t in model.graph.initializer) == sorted(taken)
        assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
        assert {
            place.value
            for t in model.graph.initializer
            for place in t.external_data
            if place.key == "location"
        } == {"weights.safetensors"}
        assert str(Path.home()) not in str(model) and not any(
            n.metadata_props for f in model.functions for n in f.node
        )


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compile(make("llama"), "eager", max_length=31, cache=False)


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write texts in place of graphs, in no time: for tests that run none."""
    from polar_fx.graph_files import onnx_graphs

    monkeypatch.setattr(onnx_graphs, "export_functions", lambda library: {})
    monkeypatch.setattr(
        onnx_graphs, "program_graph", lambda library, program, **rest: str(program).encode()
    )


@pytest.mark.usefixtures("no_graphs")
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    half = compile(make("llama").bfloat16(), "eager", max_length=31, cache=False)
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (compiled, {"programs": ["skip 9"]}, ProgramError, "9"),
        (compiled, {"programs": ()}, InputError, "at least one program"),
        (
            half,
            {},
            InputError,
            "written for float32 on the CPU, and the model is bfloat16 on cpu; load it in float32",
        ),
        (
            compiled,
            {"out": "there"},
            BundleError,
            "exists already; name another folder, or say overwrite=True",
        ),
        (
            compiled,
            {"out": "there", "overwrite": True},
            BundleError,
            "holds no programs.json, so it is not overwritten",
        ),
        (
            compiled,
            {"out": "no/where"},
            BundleError,
            r"is in no folder that exists; make \S+no first",
        ),
    ]
    for model, given, error, reason in refused:
        with pytest.raises(error, match=reason):
            export_onnx(model, tmp_path / given.pop("out", "new"), **given)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(BundleError, match=r"has 1\.0 MB left, .* free some space there"):
            export_onnx(compiled, tmp_path / "new")
    with monkeypatch.context() as patch:

        def full(*args: Any) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        patch.setattr("polar_fx.bundle.writer.save_file", full)
        with pytest.raises(
            BundleError, match=r"cannot be written: .*No space left .*; free some space there"
        ):
            export_onnx(compiled, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.delattr(polar_fx.graph_files, "onnx_graphs")
        patch.delitem(sys.modules, "polar_fx.graph_files.onnx_graphs")
        patch.setitem(sys.modules, "onnx_ir", None)
        with pytest.raises(InputError, match=r"pip install -e '.*\[onnx\]'"):
            export_onnx(compiled, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["there"] and list(
        (tmp_path / "there").iterdir()
    ) == []


@pytest.mark.usefixtures("no_graphs")
def test_what_was_written_is_replaced_if_that_is_asked_for(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    export_onnx(compiled, tmp_path / "new", programs=["identity", "skip 1"])
    export_onnx(compiled, tmp_path / "new", programs=["skip 2"], overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert [e["program"] for e in _about(tmp_path / "new")["programs"]] == ["0-1 3 /4"]
    assert (tmp_path / "new" / "program_0.onnx").read_text() == "0-1 3 /4" and not (
        tmp_path / "new" / "program_1.onnx"
    ).exists()


@pytest.mark.usefixtures("no_graphs")
def test_the_command_writes_onnx_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_bundles import tokenizer_of_words

    make("llama").save_pretrained(tmp_path / "model")
    tokenizer_of_words().save_pretrained(tmp_path / "model")

    def run(*more: str) -> dict[str, Any]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        given = (
            "--form",
            "onnx",
            "--out",
            str(tmp_path / "graphs"),
            "--model",
            str(tmp_path / "model"),
            *more,
        )
        return command.execute(argparse.Namespace(**vars(parser.parse_args(given)), json=False))

    result = run("--programs", "skip 1")
    assert result["programs"] == _about(tmp_path / "graphs")
    texts = [program["program"] for program in result["programs"]["programs"]]
    assert texts == ["0 2-3 /4", "0-3 /4"], "the identity comes along, and last"
    printed = capsys.readouterr().out
    assert "2 programs, " in printed and result["programs"]["fingerprint"] in printed
    for more, error, reason in (
        ((), BundleError, "exists already"),
        (
            ("--batch", "2"),
            InputError,
            "--batch is for bundles: ONNX graphs take any batch and length",
        ),
        (("--predictor", str(tmp_path)), InputError, "--predictor is for bundles"),
        (("--policy", "accuracy"), InputError, "--policy 'accuracy' needs --predictor"),
    ):
        with pytest.raises(error, match=reason):
            run(*more)

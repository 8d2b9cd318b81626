"""Files that a former version wrote still work: a bundle, records, a predictor, an ONNX graph.

What they are is in tests/data/former/README.md. Shape legend: T tokens, V vocabulary.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import polar_fx
from places import TESTS
from polar_fx.backends import AotInductorBackend
from polar_fx.bundle import add_program, load_bundle, verify_bundle
from polar_fx.cli import main
from polar_fx.compiled import CompiledModel
from polar_fx.predictor.saved import load_selector, read_notes
from polar_fx.runtime.code_key import target_of
from polar_fx.search.records.record_file import RecordReader
from portable_regions import use_graphs
from tiny_bundles import Mutable

FORMER = TESTS / "data" / "former"
PROGRAMS = ("identity", "skip 1", "0 (1-2)*2@0.5 3")
PROMPT = torch.tensor([[72, 101, 108, 108, 111, 33]])


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    model, _ = polar_fx.load(FORMER / "model")
    return polar_fx.compile(model, "eager", max_length=31, cache=False)


def expected(program: str) -> torch.Tensor:
    """[T, V]: the logits of the prompt that the former version gave."""
    return load_file(FORMER / "expected.safetensors")["logits"][PROGRAMS.index(program)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_give_the_same_logits(compiled: CompiledModel, program: str) -> None:
    torch.testing.assert_close(compiled.forward(PROMPT, program=program)[0], expected(program))


def test_a_bundle_is_whole_and_names_its_machine() -> None:
    manifest = verify_bundle(FORMER / "bundle", target=False)
    for program, text in zip(manifest.programs, PROGRAMS, strict=True):
        assert program == polar_fx.Program.parse(text, 4)
    own = (target_of(torch.device("cpu")), f"{torch.__version__} {torch.version.git_version}")
    if (manifest.processor, manifest.torch) != own:
        with pytest.raises(polar_fx.BundleError, match="is of a bundle for"):
            verify_bundle(FORMER / "bundle")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle, whose regions are graphs, as one for this machine."""
    use_graphs(monkeypatch, tmp_path / "cache")
    copied = Mutable(shutil.copytree(FORMER / "bundle", tmp_path / "bundle"))
    manifest = copied.manifest()
    manifest["target"] |= {
        "processor": target_of(torch.device("cpu")),
        "torch": f"{torch.__version__} {torch.version.git_version}",
    }
    copied.sign(manifest)
    return copied.folder


def test_a_bundle_runs(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    for program in PROGRAMS:
        logits = loaded.forward(PROMPT, program=program)[0]
        torch.testing.assert_close(logits, expected(program), atol=1e-4, rtol=1e-4)
    tokens = loaded.generate(PROMPT, program="skip 1", max_new_tokens=1, do_sample=False)
    assert tokens[0, -1] == expected("skip 1")[-1].argmax()
    assert loaded.tokenizer("Hello!", return_tensors="pt").input_ids.shape == PROMPT.shape


def test_a_bundle_takes_programs(bundle: Path) -> None:
    add_program(bundle, "3 2 1 0")
    assert main(["bundle", "verify", str(bundle)]) == 0
    assert load_bundle(bundle).forward(PROMPT, program="3 2 1 0").isfinite().all()


def test_records_are_read_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shutil.copytree(FORMER, tmp_path / "former"))
    found = {r.question.id: len(r.explored) for r in RecordReader("run.jsonl")}
    assert len(found) == 12 and min(found.values()) > 4
    assert sum(r.baseline.correct for r in RecordReader("run.jsonl")) == 6
    search = ["search", "--model", "model", "--backend", "eager", "--data", "questions.jsonl"]
    search += ["--simulations", "12", "--prompt", "plain", "--deterministic", "--questions", "12"]
    search += ["--out", "run.jsonl", "--json"]
    assert main(search) == 0
    assert json.loads(capsys.readouterr().out)["searched"] == 0
    lines = Path("run.jsonl").read_text().splitlines(keepends=True)
    Path("run.jsonl").write_text("".join(lines[:-1]))
    assert main(search) == 0
    assert json.loads(capsys.readouterr().out)["searched"] == 1
    again = {r.question.id: len(r.explored) for r in RecordReader("run.jsonl")}
    assert found.keys() == again.keys()
    assert main(["analyze", "run.jsonl"]) == 0 and "12" in capsys.readouterr().out


def test_a_predictor_chooses_as_it_did(compiled: CompiledModel) -> None:
    selector, _ = load_selector(FORMER / "predictor", compiled.library.model_fingerprint)
    dispatcher = compiled.dispatch_by(selector, policy="mean_steps<=0.8")
    compiled.warmup()
    choices = json.loads((FORMER / "choices.json").read_text())
    for choice in choices:
        (decision,) = dispatcher.choose(torch.tensor([[choice["token"]]]))
        assert str(decision.program) == choice["program"]
        assert decision.probability == pytest.approx(choice["probability"], abs=1e-5)
    assert len({choice["program"] for choice in choices}) > 1
    assert read_notes(FORMER / "predictor")["prompts"] == {"odd": "plain@1"}


def test_an_onnx_graph_runs() -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (entry,) = json.loads((FORMER / "onnx" / "programs.json").read_text())["programs"]
    session = runtime.InferenceSession(
        str(FORMER / "onnx" / entry["file"]), providers=["CPUExecutionProvider"]
    )
    slots = {
        f"past.{step}.{part}": np.zeros((1, slot["heads"], 16, slot[f"{part}_size"]), np.float32)
        for step, slot in enumerate(entry["slots"])
        for part in ("key", "value")
    }
    places = np.arange(PROMPT.shape[1])[None]
    inputs = {"input_ids": PROMPT.numpy(), "positions": places, "logits_at": places, **slots}
    logits = torch.from_numpy(session.run(["logits"], inputs)[0][0])
    torch.testing.assert_close(logits, expected(PROGRAMS[2]), atol=1e-4, rtol=1e-4)


def test_the_backend_is_put_back() -> None:
    """`use_graphs` lasts no longer than the test that asks for it."""
    assert AotInductorBackend.build.__module__ == "polar_fx.backends.aot_inductor"

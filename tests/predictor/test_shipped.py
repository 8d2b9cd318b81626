"""The predictor in the box: what it holds, and which model it takes."""

import json
from pathlib import Path

import pytest
import torch

import polar_fx
from polar_fx.cli import main
from polar_fx.errors import InputError
from polar_fx.predictor import shipped
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu
from polar_fx.predictor.policy import Calibration, Policy
from polar_fx.predictor.saved import load_selector, read_notes, save_selector
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.program import Program
from tiny_search import save_tiny

MENU = Menu.of([Program.parse(text, 6) for text in ("skip 3", "repeat 4")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor for the tiny model, captured otherwise; "skip 3" is likeliest."""
    model, _ = polar_fx.load(folder)
    library = polar_fx.compile(model, "eager", max_length=32).library
    network = SelectorNetwork(2 * model.config.hidden_size, len(MENU))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.outer.bias.copy_(torch.tensor([-2.0, 2.0, -2.0]))
    selector = Selector(MENU, Features(1, 4), network=network, calibration=Calibration(0.0, {}))
    notes = {"weights": library.weights_fingerprint}
    target = tmp_path_factory.mktemp("box")
    return save_selector(
        selector, target, model="another fingerprint", policy=Policy("accuracy"), notes=notes
    )


@pytest.fixture
def box(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That predictor in the place of the shipped one."""
    monkeypatch.setattr(shipped, "FOLDER", made)
    return made


def test_it_is_taken_by_name(folder: Path, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = polar_fx.compile(folder, "eager", max_length=32, predictor="default")
    compiled.warmup(batch=1)
    _, report = compiled.dispatch(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert report.decisions[0].program == MENU.programs[1]
    asked = ["run", "--model", str(folder), "--prompt", "7 + 2 =", "--predictor", "default"]
    asked += ["--max-new-tokens", "3", "--json"]
    assert main(asked) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["program"] == "0-2 4-5 /6" and result["probability"] == pytest.approx(
        0.881, abs=1e-3
    )
    assert main([*asked, "--policy", "identity"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["program"] == "0-5 /6" and result["probability"] is None


def test_another_model_or_dtype_is_refused(folder: Path, box: Path) -> None:
    for dtype, depth in (("bfloat16", 6), ("float32", 5)):
        model, _ = polar_fx.load(folder, dtype)
        model.model.layers = model.model.layers[:depth]
        model.config.num_hidden_layers = depth
        with pytest.raises(InputError, match="is for the embedded default model in bfloat16"):
            polar_fx.compile(model, "eager", max_length=32, predictor="default", check=False)


def test_a_program_or_a_predictor_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", "--model", str(folder), "--prompt", "7 + 2 ="]
    assert main([*asked, "--predictor", "default", "--program", "skip 3"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main([*asked, "--policy", "accuracy"]) == 2
    assert "needs --predictor" in capsys.readouterr().err


def test_what_is_in_the_box() -> None:
    selector, policy = load_selector(shipped.FOLDER)
    about = shipped.about()
    assert about == read_notes(shipped.FOLDER)
    assert selector.menu.depth == 30 and selector.menu.programs[0].is_identity
    policy.check(selector.calibration, None)
    assert sum(file.stat().st_size for file in shipped.FOLDER.iterdir()) < 1_500_000
    assert len(about["weights"]) == 64 and about["dtype"] == shipped.DTYPE
    rows = about["test"]["rows"]
    assert rows[0]["task"] == "overall"
    assert {row["task"] for row in rows[1:]} == set(about["tasks"])
    assert sum(row["n"] for row in rows[1:]) == rows[0]["n"] == about["test"]["questions"]
    assert all(row["gain"]["low"] <= row["gain"]["value"] <= row["gain"]["high"] for row in rows)

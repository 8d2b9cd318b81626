"""Predictors and bundles on the hub: saved with a card, uploaded in one commit, fetched again.

No hub is asked: uploads are caught, and what was fetched lies in a cache folder of the hub's form.
"""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

import polar_fx
from polar_fx.bundle import BundledModel, BundleError
from polar_fx.compiled import compile
from polar_fx.errors import InputError, ModelNotFoundError
from polar_fx.predictor.saved_predictor import SavedPredictor
from polar_fx.predictor.shipped import FOLDER, TrainedOn, load_named, trained_on
from tiny_models import make

COMMIT = "0" * 40
Uploads = list[dict[str, Any]]


@pytest.fixture(scope="module")
def predictor() -> SavedPredictor:
    return SavedPredictor.from_pretrained(FOLDER)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Uploads:
    """What was uploaded, each folder kept."""
    made: Uploads = []

    def create(self: HfApi, repo_id: str, **asked: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload(self: HfApi, *, folder_path: Path, **asked: Any) -> str:
        kept = shutil.copytree(folder_path, tmp_path / f"uploaded-{len(made)}")
        linked = {path.name for path in Path(folder_path).rglob("*") if path.is_symlink()}
        made.append({**asked, "folder": kept, "linked": linked})
        return f"https://huggingface.co/{asked['repo_id']}/commit/{COMMIT}"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return made


@pytest.fixture
def in_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts a folder in a hub cache of this test as a repository: blobs, and links to them."""
    repository = tmp_path / "hub" / "models--me--mine"
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder: Path) -> None:
        (repository / "blobs").mkdir(parents=True)
        for number, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
            blob = repository / "blobs" / str(number)
            shutil.copy(file, blob)
            link = repository / "snapshots" / COMMIT / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        (repository / "refs").mkdir()
        (repository / "refs" / "v1").write_text(COMMIT)

    return put


def test_a_predictor_is_json_and_safetensors_and_a_card(
    predictor: SavedPredictor, tmp_path: Path
) -> None:
    place = predictor.save_pretrained(tmp_path / "mine", about="Right on 16.7 %.")
    names = {path.name for path in place.iterdir()}
    assert names == {"predictor.json", "predictor.safetensors", "README.md"}
    again = SavedPredictor.from_pretrained(place)
    assert (again.model, again.notes, again.policy) == (
        predictor.model,
        predictor.notes,
        predictor.policy,
    )
    features = torch.randn(3, predictor.selector.num_features)
    assert torch.equal(
        torch.as_tensor(again.selector.probabilities(features)),
        torch.as_tensor(predictor.selector.probabilities(features)),
    )
    card = ModelCard.load(place / "README.md")
    assert card.data["library_name"] == "polar_fx" and "layer-skipping" in card.data["tags"]
    for said in ("SmolLM2-135M-Instruct in bfloat16", "`0-3 19-29 /30` | 50%", "Right on 16.7 %."):
        assert said in card.text


def test_a_push_is_one_commit(predictor: SavedPredictor, uploads: Uploads) -> None:
    address = predictor.push_to_hub("me/mine", private=True, revision="v1")
    assert address.endswith(COMMIT) and len(uploads) == 1
    assert uploads[0]["repo_id"] == "me/mine" and uploads[0]["revision"] == "v1"
    assert SavedPredictor.from_pretrained(uploads[0]["folder"]).model == predictor.model


def test_what_the_hub_refuses_is_an_input_error(predictor: SavedPredictor) -> None:
    with pytest.raises(InputError, match=r"'a/b/c'.*hf auth login"):
        predictor.push_to_hub("a/b/c")


def test_a_predictor_from_the_cache_of_the_hub(predictor: SavedPredictor, in_cache: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="'me/mine'.*in the hub's local cache"):
        SavedPredictor.from_pretrained("me/mine", local_files_only=True)
    in_cache(FOLDER)
    found = SavedPredictor.from_pretrained("me/mine", revision="v1", local_files_only=True)
    assert found.model == predictor.model
    with pytest.raises(ModelNotFoundError, match="v2|not found"):
        SavedPredictor.from_pretrained("me/mine", revision="v2", local_files_only=True)


def test_only_files_of_the_kind_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RepositoryNotFoundError("no such repository", response=response)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelNotFoundError, match="no such repository; name a folder"):
        SavedPredictor.from_pretrained("me/mine", revision="v1", token="t")
    assert asked["allow_patterns"] == ["predictor.json", "predictor.safetensors"]
    assert (asked["name"], asked["revision"], asked["token"]) == ("me/mine", "v1", "t")
    with pytest.raises(ModelNotFoundError):
        BundledModel.from_pretrained("me/mine", trust_remote_code=True)
    assert not any(pattern == "*" for pattern in asked["allow_patterns"])


def test_a_revision_is_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="revision='v1' is for repositories"):
        SavedPredictor.from_pretrained(FOLDER, revision="v1")
    with pytest.raises(InputError, match="revision='v1' is for models of the hub"):
        polar_fx.load(FOLDER, revision="v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="cannot load 'me/none'"):
        polar_fx.load("me/none", revision="v1", local_files_only=True)


def test_a_predictor_says_for_which_dtype_it_is(predictor: SavedPredictor) -> None:
    for named, model in ((FOLDER, None), (predictor, None), (FOLDER, "a-model")):
        assert trained_on(named, model) == TrainedOn("bfloat16")
    model = make("llama")
    assert trained_on(predictor, model) == TrainedOn()
    for named in (FOLDER, predictor):
        with pytest.raises(InputError, match="trained for SmolLM2-135M-Instruct in bfloat16"):
            compile(model, "eager", max_length=63, predictor=named)


def test_a_predictor_of_quantized_weights_has_the_model_loaded_so(
    predictor: SavedPredictor, tmp_path: Path
) -> None:
    made = dataclasses.replace(predictor, notes={**predictor.notes, "quantize": "int8"})
    place = made.save_pretrained(tmp_path / "mine")
    assert trained_on(place) == trained_on(made) == TrainedOn("bfloat16", "int8")
    assert "in bfloat16, int8" in repr(made)
    with pytest.raises(InputError, match="trained for SmolLM2-135M-Instruct in bfloat16, int8"):
        compile(make("llama"), "eager", max_length=63, predictor=place)


def test_a_predictor_is_known_by_its_weights_from_a_folder_too(
    predictor: SavedPredictor, tmp_path: Path
) -> None:
    library = compile(make("llama"), "eager", max_length=63).library
    known = {**predictor.notes, "weights": library.weights_fingerprint}
    place = dataclasses.replace(predictor, model="0", notes=known).save_pretrained(tmp_path / "p")
    for named in (place, SavedPredictor.from_pretrained(place)):
        assert load_named(named, library)[1] == predictor.policy


def test_a_bundle_does_not_take_a_folder_that_holds_something(
    whole_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "note").touch()
    with pytest.raises(BundleError, match="not empty.*another folder"):
        BundledModel.from_pretrained(whole_bundle).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_bundle_goes_to_the_hub_and_comes_back(
    whole_bundle: Path, uploads: Uploads, in_cache: Any
) -> None:
    bundle = BundledModel.from_pretrained(whole_bundle)
    bundle.push_to_hub("me/mine", about="Measured nowhere.")
    folder = uploads[0]["folder"]
    assert "weights.safetensors" in uploads[0]["linked"]  # no second copy on disk
    fingerprint = bundle.manifest.fingerprint
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert fingerprint in text and "Measured nowhere." in text
    in_cache(folder)
    with pytest.raises(InputError, match="trust_remote_code=True"):
        BundledModel.from_pretrained("me/mine", local_files_only=True)
    with pytest.raises(BundleError, match="has fingerprint"):
        BundledModel.from_pretrained(
            "me/mine", revision=COMMIT, local_files_only=True, fingerprint="0"
        )
    once, again = (
        BundledModel.from_pretrained(
            "me/mine", revision="v1", local_files_only=True, fingerprint=fingerprint
        )
        for _ in range(2)  # the second time from the folder without links
    )
    assert once.folder == again.folder and not any(p.is_symlink() for p in again.folder.rglob("*"))
    assert again.programs == bundle.programs and again.has_tokenizer
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again.forward(ids), bundle.forward(ids))

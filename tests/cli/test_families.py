"""Telling which types of models run, each by a tiny one that is made by the names of its sizes."""

import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from polar_fx.cli import main
from polar_fx.explain.families import Family, causal_kinds, examine, markdown, tiny_model


def test_a_type_that_runs_and_one_that_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "llama", "cpmant", "--json"]) == 0
    found = {f["kind"]: f for f in json.loads(capsys.readouterr().out)["families"]}
    assert found["llama"] == {"kind": "llama", "state": "exact", "why": "", "keeps_states": False}
    assert found["cpmant"]["state"] == "refused" and "its CpmAntModel" in found["cpmant"]["why"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("falcon_h1", {"mamba_d_head": 16, "mamba_n_heads": 4}),  # one follows from the other
        ("cohere_compass_text", {"num_hidden_layers": 4}),  # rotary settings for kinds of layers
        ("xmod", {"default_language": "en_XX"}),  # one of those that it has
        ("dbrx", {"d_model": 32}),  # lacks what its own code reads
    ],
)
def test_sizes_that_fit_together(kind: str, names: dict[str, Any]) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such type")
    config = tiny_model(kind).config
    assert {name: getattr(config, name) for name in names} == names


@pytest.mark.skipif(
    "gemma4_unified_assistant" not in CONFIG_MAPPING, reason="this transformers has no such type"
)
def test_a_type_that_does_not_run_by_itself() -> None:
    found = examine("gemma4_unified_assistant")
    assert found.state == "refused" and "does not run on tokens alone" in found.why


def test_a_type_that_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "lama"]) == 2
    assert "of type 'lama'; did you mean 'llama'?" in capsys.readouterr().err
    assert {"llama", "gpt2"} <= set(causal_kinds())


def test_the_table() -> None:
    families = [Family("one", "exact", keeps_states=True), Family("two", "refused", "a | b")]
    assert markdown(families).splitlines()[2:] == [
        "| one | exact | keeps states |",
        "| two | refused | a / b |",
    ]

"""Telling which types of models run, each by a tiny one that is made by the names of its sizes."""

import json

import pytest

from polar_fx.cli import main
from polar_fx.explain.families import Family, causal_kinds, markdown


def test_a_type_that_runs_and_one_that_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "llama", "cpmant", "--json"]) == 0
    found = {f["kind"]: f for f in json.loads(capsys.readouterr().out)["families"]}
    assert found["llama"] == {"kind": "llama", "state": "exact", "why": "", "keeps_states": False}
    assert found["cpmant"]["state"] == "refused" and "layers of CpmAnt" in found["cpmant"]["why"]


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

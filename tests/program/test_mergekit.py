"""Recipes of mergekit: read as programs, written from them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from polar_fx.errors import InputError, ProgramError
from polar_fx.program import Program
from polar_fx.program.mergekit import from_mergekit, to_mergekit

# as mergekit's documentation writes them
RECIPE = """
slices:
  - sources:
      - model: someone/a-model
        layer_range: [0, 3]
  - sources:
      - model: someone/a-model
        layer_range: [1, 6]
merge_method: passthrough
dtype: float16
"""


def test_slices_are_runs_of_a_path(tmp_path: Path) -> None:
    program = from_mergekit(RECIPE, 6)
    assert program == Program.from_path([0, 1, 2, 1, 2, 3, 4, 5], 6)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    assert from_mergekit(tmp_path / "recipe.yml", 6) == program
    assert from_mergekit(yaml.safe_load(RECIPE), 6) == program


@given(
    st.integers(1, 9).flatmap(
        lambda d: st.tuples(st.just(d), st.lists(st.integers(0, d - 1), min_size=1, max_size=12))
    )
)
def test_what_is_written_is_read_back(drawn: tuple[int, list[int]]) -> None:
    depth, path = drawn
    program = Program.from_path(path, depth)
    assert from_mergekit(to_mergekit(program, "someone/a-model"), depth) == program


def test_a_written_recipe_is_what_mergekit_takes() -> None:
    recipe = yaml.safe_load(to_mergekit(Program.parse("skip 2", 5), "./m", dtype="float32"))
    assert recipe == {
        "slices": [
            {"sources": [{"model": "./m", "layer_range": [0, 2]}]},
            {"sources": [{"model": "./m", "layer_range": [3, 5]}]},
        ],
        "merge_method": "passthrough",
        "dtype": "float32",
    }


def changed(**fields: Any) -> dict[str, Any]:
    return {**yaml.safe_load(RECIPE), **fields}


def one(**source: Any) -> list[dict[str, Any]]:
    return [{"sources": [{"model": "m", "layer_range": [0, 2], **source}]}]


REFUSED = {
    "method": (changed(merge_method="slerp"), "merge_method is 'slerp', which changes weights"),
    "models": (changed(slices=one() + one(model="other")), "takes layers of 2 models"),
    "nothing": ({"models": []}, "has no list `slices`"),
    "two sources": (changed(slices=[{"sources": one() * 2}]), "has to name one source"),
    "weights": (changed(slices=one(parameters={"scale": 0.5})), "`parameters`, which change"),
    "range": (changed(slices=one(layer_range=[3, 1])), r"layer_range is \[3, 1\]"),
    "text": ("a: [\n", "is no YAML"),
    "list": ("- 1\n- 2\n", "no YAML mapping"),
    "file": ("/nowhere/recipe.yml", "cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_program_can_run_is_refused(case: str) -> None:
    recipe, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        from_mergekit(recipe, 6)


def test_layers_that_are_not_there_and_damping_are_refused() -> None:
    with pytest.raises(ProgramError, match="ends after the model's 5 layers"):
        from_mergekit(RECIPE, 5)
    with pytest.raises(ProgramError, match="has damping"):
        to_mergekit(Program.parse("repeat 1 x2 @0.5", 5), "m")

"""Menus, policies, selectors: what is chosen among proposals, and a selector on disk."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polar_fx.errors import InputError
from polar_fx.predictor.features import Features
from polar_fx.predictor.known_tasks import KnownTasks
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration, Policy
from polar_fx.predictor.saved import load_selector, read_notes, save_selector
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.program import Program

DEPTH = 6
# steps 6 5 3 7 5
MENU = Menu.of([Program.parse(t, DEPTH) for t in ("skip 3", "skip 2-4", "repeat 4", "skip 5")])


def proposal(*chances: float) -> Proposal:
    return Proposal(MENU.programs, MENU.steps, np.array(chances))


def choose(policy: str, *chances: float, **settings: Any) -> str:
    costs = settings.pop("costs", None)
    found = Policy.parse(policy, DEPTH).choose(
        proposal(*chances), Calibration(**settings), costs_ms=costs
    )
    return str(MENU.programs[found]).removesuffix(" /6")


def test_a_menu_begins_with_the_identity() -> None:
    assert (
        MENU.programs[0].is_identity and MENU.steps.tolist() == [6, 5, 3, 7, 5] and len(MENU) == 5
    )
    assert (
        Menu.of([MENU.programs[1], Program.identity(DEPTH), MENU.programs[1]]).programs
        == MENU.programs[:2]
    )
    assert Menu.of((), 4).programs == (Program.identity(4),)
    assert MENU.index(MENU.programs[3]) == 3
    for programs, match in (
        (MENU.programs[1:], "begins with the identity"),
        ((), "empty"),
        ((*MENU.programs, MENU.programs[1]), "twice"),
        ((*MENU.programs, Program.parse("skip 1", 5)), "depth 5, the menu 6"),
    ):
        with pytest.raises(InputError, match=match):
            Menu(programs)
    with pytest.raises(InputError, match="not among the menu's 5"):
        MENU.index(Program.parse("skip 0", DEPTH))
    with pytest.raises(InputError, match="needs a depth"):
        Menu.of(())


def test_accuracy_leaves_the_identity_only_for_enough() -> None:
    assert choose("accuracy", 0.5, 0.75, 0.4, 0.1, 0.2, threshold=0.25) == "0-2 4-5"
    assert choose("accuracy", 0.5, 0.74, 0.4, 0.1, 0.2, threshold=0.25) == "0-5"
    assert choose("accuracy", 0.5, 0.9, 0.4, 0.1, 0.2) == "0-5", "never, before it was calibrated"
    assert choose("accuracy", 0.5, 0.6, 0.4, 0.6, 0.2, threshold=0.0) == "0-2 4-5", (
        "of equals fewer steps"
    )
    assert choose("accuracy", 0.6, 0.6, 0.6, 0.1, 0.2, threshold=0.0) == "0-1 5"
    assert choose("accuracy", 0.5, math.nan, 0.9, 0.1, 0.2, threshold=0.0) == "0-5", (
        "nothing is known"
    )


def test_budgets() -> None:
    chances = (0.9, 0.5, 0.4, 0.95, 0.5)
    assert choose("steps<=0.9", *chances) == "0-2 4-5"  # of two equally likely and long, the first
    assert choose("steps<=0.5", *chances) == "0-1 5"
    assert choose("steps<=0.1", *chances) == "0-5", "nothing fits"
    assert choose("steps <= 2", *chances) == "0-3 (4)*2 5"
    assert choose("mean_steps<=0.9", *chances, prices={0.9: 0.0}) == "0-3 (4)*2 5"
    # 0.95 - 0.7, 0.9 - 0.6, 0.4 - 0.3
    assert choose("mean_steps<=0.9", *chances, prices={0.9: 0.6}) == "0-5"
    assert choose("mean_steps<=0.9", *chances, prices={0.9: 1.2}) == "0-1 5"
    costs = dict(zip(MENU.programs, (10.0, 8.0, 5.0, 12.0, 9.0), strict=True))
    assert choose("latency_ms<=9", *chances, costs=costs) == "0-2 4-5"
    assert choose("latency_ms<=4", *chances, costs=costs) == "0-5"


def test_fixed_programs_and_the_identity() -> None:
    assert choose("identity", 0, 1, 1, 1, 1, threshold=-1.0) == "0-5"
    assert choose("skip 3", 1, 0, 0, 0, 0) == "0-2 4-5"


@pytest.mark.parametrize(
    "text",
    ["identity", "accuracy", "steps<=0.9", "mean_steps<=0.85", "latency_ms<=30", "0-2 4-5 /6"],
)
def test_policies_are_text(text: str) -> None:
    policy = Policy.parse(text, DEPTH)
    assert (
        str(policy) == text
        and Policy.parse(str(policy), DEPTH) == policy
        and Policy.parse(policy, DEPTH) is policy
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("steps<=x", "'x' is no number"),
        ("depth<=3", "a limit of 'depth'"),
        ("fastest", "none of identity, accuracy"),
        ("steps<=0", "limit of policy 'steps' is 0"),
        ("steps<=inf", "is inf"),
        ("steps<=-1", "is -1"),
    ],
)
def test_what_is_no_policy(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Policy.parse(text, DEPTH)


def test_policies_say_what_they_lack() -> None:
    with pytest.raises(
        InputError, match="no price of mean_steps<=0.9 was set in training, only of 0.8"
    ):
        Policy.parse("mean_steps<=0.9", DEPTH).check(Calibration(prices={0.8: 0.1}), None)
    with pytest.raises(InputError, match="warmup"):
        Policy.parse("latency_ms<=3", DEPTH).check(Calibration(), {})


def test_the_threshold_is_that_of_the_task_an_input_was_recognized_as() -> None:
    accuracy = Policy("accuracy")
    one, each = Calibration(0.1), Calibration(0.1, by_task={"add": 0.3, "never": math.inf})
    gain = proposal(0.2, 0.4, 0.1, 0.1, 0.1)
    assert accuracy.choose(gain, one) == 1
    told = [accuracy.choose(replace(gain, task=task), each) for task in ("add", "never", "")]
    assert told == [0, 0, 0], "a gain of 0.2 is not enough, and what is unknown stays as it is"
    sure = proposal(0.2, 0.6, 0.1, 0.1, 0.1)
    assert accuracy.choose(replace(sure, task="add"), each) == 1


@given(
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.floats(-1, 1),
    st.floats(0, 2),
    st.sampled_from(["accuracy", "steps<=0.8", "mean_steps<=0.9"]),
)
def test_choosing_for_all_rows_at_once_is_choosing_one_by_one(
    chances: list[float], threshold: float, price: float, policy: str
) -> None:
    from polar_fx.training.selector_training import choose_all

    calibration = Calibration(threshold, {0.9: price})
    one = Policy.parse(policy, DEPTH).choose(proposal(*chances), calibration)
    row = np.array([chances])
    if policy == "accuracy":
        every = choose_all(row, MENU.steps, depth=DEPTH, threshold=threshold)
        best = max(chances)
        assert one == 0 or (chances[one] == best and best - chances[0] >= threshold)
    elif policy == "steps<=0.8":
        every = choose_all(
            np.where(MENU.steps <= 4.8, row, -1.0), MENU.steps, depth=DEPTH, threshold=-np.inf
        )
        assert MENU.steps[one] <= 4.8
    else:
        every = choose_all(row, MENU.steps, depth=DEPTH, threshold=-np.inf, price=price)
        worth = row[0] - price * MENU.steps / DEPTH
        assert worth[one] == worth.max()
    assert every.tolist() == [one]


# ------------------------------------------------------------------------------- features, selector


def test_features_look_at_the_end_of_a_prompt() -> None:
    hidden = torch.arange(12.0).reshape(6, 2).bfloat16()
    pooled = Features(2, 3).pooled(hidden)
    assert pooled.tolist() == [10, 11, 8, 9] and pooled.dtype == torch.float32
    assert Features(2, 3).tokens(hidden).shape == (3, 2)
    assert Features(2, 64).pooled(hidden[:1]).tolist() == [0, 1, 0, 1], "one token is its own mean"
    for bad in (dict(num_steps=-1), dict(window=0), dict(num_steps=True), dict(window=2.5)):
        with pytest.raises(InputError, match="features is"):
            Features(**bad)  # type: ignore[arg-type]


def selector(width: int = 3, seed: int = 0) -> Selector:
    torch.manual_seed(seed)
    network = SelectorNetwork(4, len(MENU), width=width)
    network.start_from(torch.randn(20, 4), torch.linspace(0.1, 0.9, len(MENU)))
    slopes, shifts = torch.full((5,), 1.5), torch.full((5,), -0.25)
    return Selector(
        MENU,
        Features(1, 8),
        network=network,
        calibration=Calibration(0.05, {0.9: 0.2, 0.8: 0.4}),
        slopes=slopes,
        shifts=shifts,
    )


@pytest.mark.parametrize("width", [0, 3])
def test_probabilities_are_calibrated_logits(width: int) -> None:
    made = selector(width)
    features = torch.randn(7, 4)
    logits = made.network(features).double()
    expected = 1 / (1 + torch.exp(-(1.5 * logits - 0.25)))
    np.testing.assert_allclose(made.probabilities(features), expected.detach().numpy(), atol=1e-6)
    hidden = [torch.randn(n, 2) for n in (1, 5, 20)]
    proposals = made.propose(hidden)
    one_by_one = [made.propose([h])[0].probabilities for h in hidden]
    np.testing.assert_allclose([p.probabilities for p in proposals], one_by_one, atol=1e-6)
    assert all(p.programs is MENU.programs for p in proposals)


def test_a_network_that_learned_nothing_says_the_base_rates() -> None:
    network = SelectorNetwork(4, 5, width=3)
    rates = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    network.start_from(torch.randn(50, 4), rates)
    with torch.no_grad():
        network.outer.weight.zero_()
        got = torch.sigmoid(network.eval()(torch.randn(3, 4)))
    torch.testing.assert_close(got, rates.clamp(0.01, 0.99).expand(3, 5))


def test_a_selector_fits_its_menu() -> None:
    with pytest.raises(InputError, match="scores 4 programs but the menu has 5"):
        Selector(MENU, Features(), network=SelectorNetwork(4, 4))
    with pytest.raises(InputError, match="cannot be made"):
        SelectorNetwork(0, 4)


@pytest.mark.parametrize("width", [0, 3])
def test_saved_and_loaded(width: int, tmp_path: Path) -> None:
    made = selector(width)
    folder = save_selector(
        made,
        tmp_path / "a" / "b",
        model="model x",
        policy=Policy.parse("mean_steps<=0.9", DEPTH),
        notes={"tasks": ["t"]},
    )
    loaded, policy = load_selector(folder, "model x")
    assert (loaded.menu, loaded.features, loaded.calibration, str(policy)) == (
        MENU,
        made.features,
        made.calibration,
        "mean_steps<=0.9",
    )
    features = torch.randn(6, 4)
    assert np.array_equal(loaded.probabilities(features), made.probabilities(features))
    assert read_notes(folder) == {"tasks": ["t"]} and sorted(p.name for p in folder.iterdir()) == [
        "predictor.json",
        "predictor.safetensors",
    ]
    features, tasks = torch.randn(9, 4), ["a", "b", "c"] * 3
    made.tasks = KnownTasks.learn(features, tasks, others=features, tasks_of_others=tasks)
    made.calibration = replace(made.calibration, by_task={"a": 0.25, "b": math.inf, "c": 0.0})
    save_selector(made, folder, model="model x")
    again = load_selector(folder)[0]
    assert again.calibration == made.calibration and again.tasks is not None
    found = [p.task for p in again.proposals(features)]
    assert found == [p.task for p in made.proposals(features)] and set(found) <= {*tasks, ""}
    never = selector(width)
    never.calibration = Calibration()
    save_selector(never, folder, model="model x")
    assert load_selector(folder)[0].calibration.threshold == math.inf


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "predictor.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**fields, **changes}.items() if v is not ...}))


def _spoil(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: _edit(f, version=2), "version 2"),
        (lambda f: _edit(f, format="other"), "describes no predictor"),
        (
            lambda f: _edit(f, model="model y"),
            "trained for a model without a name, of fingerprint model y",
        ),
        (lambda f: _edit(f, menu=["skip 1 /6"]), "damaged.*begins with the identity"),
        (lambda f: _edit(f, menu=["0-5 /6", "no program"]), "damaged"),
        (lambda f: _edit(f, depth=...), "damaged.*depth"),
        (lambda f: _edit(f, features={"num_steps": -2, "window": 3}), "damaged.*num_steps"),
        (lambda f: _edit(f, network={"num_features": 9, "width": 3}), "damaged"),
        (lambda f: _edit(f, calibration={"threshold": "low", "prices": {}}), "damaged"),
        (lambda f: _edit(f, tasks=["a"]), "damaged.*tasks.center"),
        (lambda f: _edit(f, policy="fastest"), "damaged.*fastest"),
        (lambda f: (f / "predictor.json").write_text("{"), "not JSON"),
        (lambda f: _spoil(f, "predictor.safetensors"), "sha256"),
        (lambda f: (f / "predictor.safetensors").unlink(), "holds no predictor"),
        (lambda f: shutil.rmtree(f), "^[^;]*p holds no predictor"),
    ],
)
def test_damaged_folders_are_refused(damage: Any, match: str, tmp_path: Path) -> None:
    folder = save_selector(selector(), tmp_path / "p", model="model x")
    damage(folder)
    with pytest.raises(InputError, match=match):
        load_selector(folder, "model x")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    made = selector()
    with torch.no_grad():
        made.network.outer.bias[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        load_selector(save_selector(made, tmp_path, model="x"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_selector(selector(), tmp_path / "file", model="x")


def test_a_policy_is_a_text() -> None:
    wrong: Any = 0.9
    with pytest.raises(InputError, match=r"policy is 0.9 \(float\); give a text: identity, "):
        Policy.parse(wrong, DEPTH)

"""How much of a reproduction fits a budget, and what a run that goes on must share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polar_fx.errors import InputError
from polar_fx.jobs.fit import PRESETS
from polar_fx.jobs.reproduction_plan import Measured, Plan, size_at
from polar_fx.jobs.stages import Probe

MEASURED = Measured(verdicts=Probe(20.0, 5.0), answering=None, seconds=30.0)


def settings(hours: float, protocol: str = "tasks") -> dict[str, Any]:
    return {"protocol": protocol, "budget": hours, "dtype": "float32"}


def planned(hours: float, rate: float = 20.0) -> Plan:
    measured = Measured(verdicts=Probe(rate, 5.0), answering=None, seconds=30.0)
    return Plan.fitting(settings(hours), measured, there={})


def test_scales_go_through_the_presets() -> None:
    assert size_at("tasks", 0.0) == PRESETS["quick"]
    assert size_at("tasks", 1.0) == PRESETS["full"]
    half = size_at("tasks", 0.5)
    assert half.searched == round((40 * 300) ** 0.5) and half.training.menu_size == 16
    assert size_at("tasks", 2.0).simulations == 200, "as many as the paper's, not more"


@pytest.mark.parametrize("hours", [0.2, 1, 3, 12])
def test_a_plan_fills_its_budget_and_keeps_within_it(hours: float) -> None:
    plan = planned(hours)
    assert 0.8 * 3600 * hours < plan.total <= 0.9 * 3600 * hours
    assert plan.seconds["measure"] == 30.0, "the measurement counts"


def test_what_is_expected_is_the_sum_of_programs_on_questions() -> None:
    plan = planned(1)
    size, menu = plan.size, plan.size.training
    searched = size.searched * (size.simulations + 1)
    assert plan.seconds["search"] == pytest.approx(searched / 20 + 5 + 10)
    screened = menu.screen_questions * (menu.num_candidates + menu.num_edits + menu.num_variations)
    assert plan.seconds["menu"] == pytest.approx(
        (screened + menu.final_questions * menu.num_finalists) / 20 / 2
    )
    assert plan.total == pytest.approx(sum(plan.seconds.values()))


def test_more_hours_and_faster_machines_do_more() -> None:
    sizes = [planned(hours).size for hours in (0.2, 1, 3, 12)]
    for name in ("searched", "train", "validation", "tested"):
        values = [getattr(size, name) for size in sizes]
        assert values == sorted(set(values)), name
    assert planned(1, rate=80).size.tested > planned(1).size.tested


def test_measuring_difficulty_counts() -> None:
    told = replace(MEASURED, identities=1200)
    plan, without = (Plan.fitting(settings(1), each, there={}) for each in (told, MEASURED))
    assert plan.size.tested < without.size.tested


def test_files_limit_a_plan() -> None:
    plan = Plan.fitting(
        settings(100, "paper"), MEASURED, there={"train": 50, "validation": 20, "test": 30}
    )
    size = plan.size
    assert (size.searched, size.train, size.validation, size.tested) == (50, 50, 20, 30)
    assert plan.answers == 30, "no more answers than test questions"


def test_generated_answers_count() -> None:
    told = Measured(verdicts=MEASURED.verdicts, answering=Probe(1.0, 5.0), seconds=30.0)
    with_answers = Plan.fitting(settings(2, "paper"), told, there={})
    without = Plan.fitting(settings(2, "paper"), MEASURED, there={})
    assert with_answers.answers and with_answers.size.tested < without.size.tested


def test_the_smallest_budget_is_named_and_is_enough() -> None:
    with pytest.raises(InputError, match="too small") as raised:
        planned(0.01)
    least = float(str(raised.value).split("at least ")[1].split()[0])
    assert planned(least).scale < -1.2
    with pytest.raises(InputError, match="too small"):
        planned(least - 0.01)


def test_a_plan_is_kept_and_other_settings_are_named(tmp_path: Path) -> None:
    plan = planned(1)
    path = plan.write(tmp_path / "plan.json")
    assert Plan.read(path, settings(1)) == plan
    with pytest.raises(InputError, match=r"budget 1, not 2; dtype 'float32', not 'bfloat16'"):
        Plan.read(path, {**settings(2), "dtype": "bfloat16"})
    path.write_text(json.dumps({"settings": settings(1)}))
    with pytest.raises(InputError, match="is no plan of a reproduction"):
        Plan.read(path, settings(1))


def test_the_plan_is_shown_with_its_numbers() -> None:
    plan = planned(1)
    shown = "\n".join(plan.lines())
    for number in (plan.size.searched, plan.size.simulations, plan.size.tested):
        assert f"{number:,}" in shown
    assert shown.splitlines()[-1].endswith(f"{plan.total / 60:.1f}")

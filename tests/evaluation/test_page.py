"""The page of an evaluation: its numbers by hand, and what a browser makes of it."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from browser import CHROMIUM, Browser, browser
from evaluation_samples import IDENTITY, LONG, PROPOSALS, QUESTIONS, RIGHT, SHORT, selector
from polar_fx.evaluation.page import Page
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration
from polar_fx.program import Program
from polar_fx.questions import Question

EVIL = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>{{data}}"
CALIBRATION = Calibration(threshold=0.4, prices={0.9: 0.8})


def page() -> Page:
    rows = [*QUESTIONS[:3], replace(QUESTIONS[3], question=EVIL, task=EVIL, answers=(EVIL,))]
    return Page.of(
        selector(CALIBRATION),
        title="a <predictor>",
        questions=rows,
        proposals=PROPOSALS,
        right=RIGHT,
        answers={1: {IDENTITY: "4", SHORT: "3"}, 3: {LONG: EVIL, Program.parse("0", 6): "?"}},
    )


def test_policies_by_hand() -> None:
    found = {policy["policy"]: policy for policy in page().policies()}
    assert list(found) == sorted(found, key=lambda name: found[name]["steps"])
    assert {name: found[name]["chosen"] for name in found} == {
        "identity": [0, 0, 0, 0],
        "accuracy": [0, 1, 0, 2],  # gains of 0.5 and 0.8 reach the threshold
        "mean_steps<=0.9": [1, 1, 1, 2],  # a step costs 0.8/6
        "steps<=0.6667": [1, 1, 1, 1],
        "steps<=1": [0, 1, 1, 1],  # of equals, the one with fewer steps
        "steps<=1.1667": [0, 1, 1, 2],
    }
    accuracy = found["accuracy"]
    assert accuracy["accuracy"] == 3 / 4 and accuracy["steps"] == (6 + 4 + 6 + 7) / 4
    assert accuracy["low"] < 3 / 4 < accuracy["high"] and page().data()["best"] == 1


def test_a_budget_admits_the_steps_it_was_made_of() -> None:
    for depth in (6, 30, 61):
        menu = Menu.of([Program.from_path(range(steps), depth) for steps in range(1, depth)])
        n = len(menu)
        rows = [Question(str(i), "t", "?", ("1",)) for i in range(n)]
        whole = Page(
            title="",
            menu=menu,
            calibration=Calibration(),
            questions=rows,
            # more steps are always likelier
            proposals=[Proposal(menu.programs, menu.steps, menu.steps / (depth + 1))] * n,
            right=np.ones((n, n), dtype=bool),
        )
        budgets = [p["steps"] for p in whole.policies() if p["policy"].startswith("steps")]
        assert budgets == sorted(menu.steps)


def test_nothing_of_a_question_is_html() -> None:
    html = page().html()
    assert "<title>a &lt;predictor&gt;</title>" in html
    assert (
        html.count("<script") == 2
        and "<img" not in html
        and html.count("{{") == EVIL.count("{{") * 4
    )
    data = json.loads(re.findall(r'json">(.*?)</script>', html, re.DOTALL)[0])
    assert data["questions"][3]["question"] == EVIL, "and nothing is lost"
    assert data["questions"][1]["answers"] == {"0": "4", "1": "3"}
    assert data["questions"][3]["answers"] == {"2": EVIL}, "other programs are left out"
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Path]]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt install chromium)")
    folder = tmp_path_factory.mktemp("page")
    file = folder / "report.html"
    file.write_text(page().html(), encoding="utf-8")
    with browser(folder / "profile") as chromium:
        yield chromium, file


def _shown(chromium: Browser) -> list[list[str]]:
    return chromium.value(
        "[...document.querySelectorAll('#rows tr')].map("
        "r => [r.cells[2], r.cells[4], r.cells[5]].map(c => c.textContent))"
    )


@pytest.mark.child_process
def test_the_page_runs_and_lets_no_question_in(opened: tuple[Browser, Path]) -> None:
    chromium, file = opened
    chromium.open(file)
    assert chromium.complaints == []
    assert chromium.value("document.title") == "a <predictor>"
    assert chromium.value("document.querySelectorAll('img').length") == 0
    assert chromium.value("slider.getAttribute('aria-valuetext')") == "accuracy"
    assert _shown(chromium) == [
        ["6", "✓right", "✓right"],
        ["4", "✗4", "✓3"],
        ["6", "✗wrong", "✗wrong"],
        ["7", "✓right", f"✓{EVIL}"],
    ]
    assert chromium.value("document.querySelectorAll('#rows use').length") == 4


@pytest.mark.child_process
def test_the_slider_moves_by_keys_and_redraws(opened: tuple[Browser, Path]) -> None:
    chromium, file = opened
    chromium.open(file, "#policy=identity&show=all")
    places = [policy["policy"] for policy in page().policies()]
    chromium.value("slider.focus()")
    before = chromium.value("document.getElementById('point').getAttribute('cx')")
    chromium.press("ArrowLeft", 37)
    now = places[places.index("identity") - 1]
    assert chromium.value("slider.getAttribute('aria-valuetext')") == now
    assert chromium.value("document.querySelector('#summary b').textContent") == now
    after = chromium.value("document.getElementById('point').getAttribute('cx')")
    assert float(after) < float(before), "fewer steps are further left"
    assert now.replace("<=", "%3C%3D") in chromium.value("location.hash")


@pytest.mark.child_process
def test_questions_can_be_filtered_and_both_looks_are_readable(
    opened: tuple[Browser, Path],
) -> None:
    chromium, file = opened
    chromium.open(file, "#policy=steps%3C%3D0.6667&show=gained")
    assert [row[0] for row in _shown(chromium)] == ["4"]
    chromium.open(file, "#policy=steps%3C%3D0.6667&show=lost")
    assert _shown(chromium) == [["4", "✓right", "✗wrong"]]
    papers = []
    for scheme in ("light", "dark"):
        chromium.prefer(scheme)
        papers.append(chromium.value("getComputedStyle(document.body).backgroundColor"))
    assert papers == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]

"""The playground page: one file that asks its own server alone, whatever names and programs say."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from polar_fx.bundle import BundledModel
from polar_fx.program import Program
from polar_fx.serving.playground import playground

EVIL = "</script><img src=x onerror=alert(1)>{{data}}"


def page(**changed: Any) -> str:
    programs = tuple(Program.parse(text, 4) for text in ("skip 1", "identity", "repeat 2 @0.5"))
    facts = {
        "programs": programs,
        "architecture": "LlamaForCausalLM",
        "depth": 4,
        "dispatcher": None,
        "tokenizer": SimpleNamespace(chat_template=None),
        "pool": SimpleNamespace(max_length=63),
    }
    bundle: BundledModel = SimpleNamespace(**{**facts, **changed})  # type: ignore[assignment]
    return playground(bundle, EVIL)


def data_of(html: str) -> dict[str, Any]:
    return json.loads(re.findall(r'json">(.*?)</script>', html, re.DOTALL)[0])


def test_the_page_needs_nothing_else_and_lets_no_name_in() -> None:
    html = page()
    assert html.count("<script") == 2 and "<img" not in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "connect-src 'self'" in html and "default-src 'none'" in html
    assert data_of(html)["model"] == EVIL, "and nothing is lost"


def test_it_offers_the_programs_of_the_bundle_and_its_policy() -> None:
    data = data_of(page())
    assert [each["words"] for each in data["programs"]] == [
        "skip 1",
        "identity",
        "repeat 2 x2 @0.5",
    ]
    assert [each["identity"] for each in data["programs"]] == [False, True, False]
    assert [each["steps"] for each in data["programs"]] == [3, 4, 5]
    assert (data["policy"], data["chat"], data["longest"]) == (None, False, 63)
    talks = SimpleNamespace(chat_template="{{ messages }}")
    chosen = data_of(page(dispatcher=SimpleNamespace(policy="accuracy"), tokenizer=talks))
    assert (chosen["policy"], chosen["chat"]) == ("accuracy", True)


@pytest.mark.parametrize("place", ["about", "prompt", "program", "tokens", "temperature", "chat"])
def test_every_element_that_the_script_asks_for_is_there(place: str) -> None:
    assert f'id="{place}"' in page()

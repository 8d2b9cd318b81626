"""Pictures of programs."""

import difflib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from explained_models import PROGRAM, eager
from places import GOLDEN
from polar_fx.errors import InputError

PICTURE = GOLDEN / "program.dot"


def _golden() -> str:
    return eager("smollm3").explain(PROGRAM).dot()


def test_golden_dot() -> None:
    want, got = PICTURE.read_text(encoding="utf-8"), _golden()
    diff = "\n".join(
        difflib.unified_diff(want.splitlines(), got.splitlines(), "golden", "now", lineterm="")
    )
    assert got == want, (
        f"{diff}\nif that is meant: PYTHONPATH=tests/support python "
        "tests/explain/test_program_picture.py"
    )


def test_svg(tmp_path: Path) -> None:
    text = eager("smollm3").explain(PROGRAM).svg(tmp_path / "p.svg").read_text(encoding="utf-8")
    ET.fromstring(text)
    assert all(word in text for word in ("prologue", "repeat", "skip", "x2 @0.5", "epilogue"))
    with pytest.raises(InputError, match=r"cannot write .*nowhere/p.svg"):
        eager("smollm3").explain(PROGRAM).svg(tmp_path / "nowhere" / "p.svg")


if __name__ == "__main__":
    PICTURE.write_text(_golden(), encoding="utf-8")

"""Pictures of programs."""

import difflib
import shutil
from pathlib import Path

import pytest

from explained_models import PROGRAM, eager
from places import GOLDEN
from polar_fx.errors import PolarError

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


@pytest.mark.skipif(
    shutil.which("dot") is None, reason="graphviz is not installed (apt install graphviz)"
)
def test_svg(tmp_path: Path) -> None:
    path = eager("smollm3").explain(PROGRAM).svg(tmp_path / "p.svg")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<?xml") and all(
        word in text for word in ("prologue", "repeat", "skip", "x2 @0.5", "epilogue")
    )


def test_without_graphviz_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PolarError, match=r"apt install graphviz.*\.dot\(\)"):
        eager().explain().svg(tmp_path / "p.svg")
    assert not (tmp_path / "p.svg").exists()


if __name__ == "__main__":
    PICTURE.write_text(_golden(), encoding="utf-8")

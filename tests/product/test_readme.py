"""Every python block of the README runs, in order, in one namespace."""

import re
from typing import Any

from places import ROOT

README = ROOT / "README.md"


def test_python_blocks_run(smollm2: Any, capsys: Any) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, python block {number + 1}", "exec"), namespace)
    out = capsys.readouterr().out
    assert "identity -> " in out and "Segment(" in out

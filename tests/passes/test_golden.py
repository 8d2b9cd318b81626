"""The text of a small graph after each pass, kept in tests/golden.

PYTHONPATH=tests/support python tests/passes/test_golden.py writes the files anew; read the diff
before committing it.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from hand_made import (
    flat,
    on_cpu,
    over_integers,
    several_queries,
    several_rows,
    single_query,
    single_row,
    with_experts,
)
from places import GOLDEN, printed_in_processes
from polar_fx.passes import (
    PASSES,
    flat_pipeline,
    graph_fingerprint,
    graph_text,
    library_pipeline,
    program_pipeline,
)
from polar_fx.passes.address_kv import AddressKv
from polar_fx.passes.schedule_layers import ScheduleLayers

PATH, BLENDS = (0, 1, 2, 1, 2), ((1, 5, 0.5),)


def library() -> GraphModule:
    return library_pipeline().run(flat((0.5, 0.5, 0.25))).graph_module


def _layer() -> GraphModule:
    gm = library().get_submodule("layer_kind_0")
    assert isinstance(gm, GraphModule)
    return gm


CASES: dict[str, Callable[[], GraphModule]] = {
    "captured": lambda: flat((0.5,), noise=True),
    "eliminate-noops": lambda: (
        PASSES["eliminate-noops"]().run(flat((0.5,), noise=True)).graph_module
    ),
    "eliminate-dead-code": lambda: (
        PASSES["eliminate-dead-code"]().run(flat((0.5,), noise=True)).graph_module
    ),
    "outline-layers": lambda: PASSES["outline-layers"]().run(flat((0.5, 0.25))).graph_module,
    "dedupe-layers": library,
    "schedule-layers": lambda: ScheduleLayers(PATH, BLENDS).run(library()).graph_module,
    "assign-kv-slots": lambda: program_pipeline(PATH, BLENDS).run(library()).graph_module,
    "keep-kv-writes": lambda: PASSES["keep-kv-writes"]().run(_layer()).graph_module,
    "address-kv": lambda: AddressKv(block=4).run(_layer()).graph_module,
    "quantized-linear": lambda: (
        PASSES["quantized-linear"]().run(on_cpu(over_integers(torch.bfloat16))).graph_module
    ),
    "grouped-linear": lambda: PASSES["grouped-linear"]().run(on_cpu(with_experts())).graph_module,
    "matvec-to-reduction": lambda: (
        PASSES["matvec-to-reduction"]().run(on_cpu(single_row(torch.bfloat16))).graph_module
    ),
    "linear-to-row-kernel": lambda: (
        PASSES["linear-to-row-kernel"]().run(on_cpu(several_rows(torch.bfloat16))).graph_module
    ),
    "linear-to-onednn": lambda: (
        PASSES["linear-to-onednn"]().run(on_cpu(several_rows(tokens=2))).graph_module
    ),
    "attention-to-reduction": lambda: (
        PASSES["attention-to-reduction"]().run(on_cpu(single_query(torch.bfloat16))).graph_module
    ),
    "attention-over-blocks": lambda: (
        PASSES["attention-over-blocks"]().run(on_cpu(several_queries())).graph_module
    ),
    "inline-layers": lambda: (
        flat_pipeline().run(program_pipeline((1, 1)).run(library()).graph_module).graph_module
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    want, got = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8"), graph_text(CASES[name]())
    diff = "\n".join(
        difflib.unified_diff(want.splitlines(), got.splitlines(), "golden", "now", lineterm="")
    )
    assert got == want, (
        f"{diff}\nif that is meant: PYTHONPATH=tests/support python tests/passes/test_golden.py"
    )


def test_every_pass_has_a_golden() -> None:
    assert PASSES.keys() <= CASES.keys()
    assert {p.stem for p in GOLDEN.glob("*.txt")} == CASES.keys()


@pytest.mark.child_process
def test_text_and_fingerprint_are_equal_in_another_process() -> None:
    here = Path(__file__).parent
    code = (
        "from test_golden import *; g = library(); print(graph_fingerprint(g)); "
        "print(graph_text(g), end='')"
    )
    seen = printed_in_processes(code, here)
    assert seen == {f"{graph_fingerprint(library())}\n{graph_text(library())}"}


if __name__ == "__main__":
    for case, make in CASES.items():
        (GOLDEN / f"{case}.txt").write_text(graph_text(make()), encoding="utf-8")

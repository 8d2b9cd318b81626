"""What every pass promises, and what pipelines promise about passes."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.fx import GraphModule

from hand_made import (
    flat,
    on_cpu,
    over_integers,
    run,
    several_queries,
    several_rows,
    single_query,
    single_row,
    with_experts,
)
from places import ROOT, printed_in_processes
from polar_fx.passes import (
    PASSES,
    Pass,
    PassError,
    PassResult,
    Pipeline,
    VerifyError,
    graph_text,
    library_pipeline,
    program_pipeline,
)
from polar_fx.passes.address_kv import AddressKv
from polar_fx.passes.base import copy_graph_module
from polar_fx.passes.schedule_layers import ScheduleLayers

PATH, BLENDS = (0, 2, 1, 2), ((1, 3, 0.5),)


def library() -> GraphModule:
    return library_pipeline().run(flat((0.5, 0.5, 0.25), noise=True)).graph_module


def step_graph() -> GraphModule:
    return program_pipeline(PATH, BLENDS).run(library()).graph_module


def layer() -> GraphModule:
    gm = library().get_submodule("layer_kind_0")
    assert isinstance(gm, GraphModule)
    return gm


def noisy() -> GraphModule:
    return flat((0.5, 0.5, 0.25), noise=True)


# Each pass, and a graph it has something to do on.
CASES: dict[str, tuple[Pass, Callable[[], GraphModule]]] = {
    "eliminate-noops": (PASSES["eliminate-noops"](), noisy),
    "eliminate-dead-code": (PASSES["eliminate-dead-code"](), noisy),
    "outline-layers": (PASSES["outline-layers"](), noisy),
    "dedupe-layers": (
        PASSES["dedupe-layers"](),
        lambda: PASSES["outline-layers"]().run(noisy()).graph_module,
    ),
    "schedule-layers": (ScheduleLayers(PATH, BLENDS), library),
    "assign-kv-slots": (
        PASSES["assign-kv-slots"](),
        lambda: ScheduleLayers(PATH, BLENDS).run(library()).graph_module,
    ),
    "keep-kv-writes": (PASSES["keep-kv-writes"](), layer),
    "address-kv": (AddressKv(block=4), layer),
    "quantized-linear": (PASSES["quantized-linear"](), lambda: on_cpu(over_integers())),
    "grouped-linear": (PASSES["grouped-linear"](), lambda: on_cpu(with_experts())),
    "matvec-to-reduction": (PASSES["matvec-to-reduction"](), lambda: on_cpu(single_row())),
    "linear-to-row-kernel": (PASSES["linear-to-row-kernel"](), lambda: on_cpu(several_rows())),
    "linear-to-onednn": (PASSES["linear-to-onednn"](), lambda: on_cpu(several_rows(tokens=2))),
    "attention-to-reduction": (PASSES["attention-to-reduction"](), lambda: on_cpu(single_query())),
    "attention-over-blocks": (PASSES["attention-over-blocks"](), lambda: on_cpu(several_queries())),
    "inline-layers": (PASSES["inline-layers"](), step_graph),
}
each_pass = pytest.mark.parametrize("name", PASSES)


def test_every_pass_has_a_case() -> None:
    assert CASES.keys() == PASSES.keys()


@each_pass
def test_a_pass_is_a_frozen_dataclass_with_a_kebab_case_name(name: str) -> None:
    kind = PASSES[name]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", name) and kind.name == name
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert kind.__doc__


@each_pass
def test_input_is_left_alone_and_modified_is_honest(name: str) -> None:
    this, make = CASES[name]
    gm = make()
    before, numbers = graph_text(gm), run(gm)
    result = this.run(gm)
    assert graph_text(gm) == before, "the input graph was changed"
    assert torch.equal(run(gm)[0], numbers[0])
    assert result.modified and graph_text(result.graph_module) != before and result.counts


@each_pass
def test_a_second_run_changes_nothing(name: str) -> None:
    this, make = CASES[name]
    once = this.run(make()).graph_module
    again = this.run(once)
    assert not again.modified and again.graph_module is once


@each_pass
def test_the_same_graph_gives_the_same_text(name: str) -> None:
    this, make = CASES[name]
    assert graph_text(this.run(make()).graph_module) == graph_text(this.run(make()).graph_module)


@pytest.mark.parametrize("name", [n for n, p in PASSES.items() if p.preserves_numerics])
def test_numerics_are_preserved_to_the_bit(name: str) -> None:
    this, make = CASES[name]
    want, want_slots = run(make())
    got, got_slots = run(this.run(make()).graph_module)
    assert want.abs().sum() > 0 and torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(got_slots, want_slots, strict=True))


@each_pass
def test_tensors_are_shared_not_copied(name: str) -> None:
    this, make = CASES[name]
    gm = make()
    own = {p.data_ptr() for p in gm.parameters()}
    assert {p.data_ptr() for p in this.run(gm).graph_module.parameters()} <= own


@each_pass
def test_text_form_parses_back(name: str) -> None:
    this, _ = CASES[name]
    assert Pipeline.parse(this.spec()) == Pipeline((this,))


def test_content_ids_tell_passes_options_and_classes_apart() -> None:
    @dataclass(frozen=True)
    class Later(ScheduleLayers):
        pass

    different = [
        *(p for p, _ in CASES.values()),
        ScheduleLayers(PATH),
        ScheduleLayers((0,)),
        Later(PATH),
    ]
    assert len({p.content_id for p in different}) == len(different)
    as_json: Any = (list(PATH), [[1, 3, 0.5]])  # tuples come back from JSON as lists
    assert ScheduleLayers(PATH, BLENDS).content_id == ScheduleLayers(*as_json).content_id


@pytest.mark.child_process
def test_content_ids_are_stable_across_processes() -> None:
    code = (
        "from polar_fx.passes import *; print(program_pipeline((0, 2, 1), ((1, 3, "
        "0.5),)).content_id, library_pipeline().content_id)"
    )
    seen = {printed.strip() for printed in printed_in_processes(code, ROOT)}
    assert seen == {
        f"{program_pipeline((0, 2, 1), ((1, 3, 0.5),)).content_id} {library_pipeline().content_id}"
    }


# ---------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize(
    "pipeline", [library_pipeline(), program_pipeline(PATH, BLENDS), Pipeline(())], ids=str
)
def test_pipelines_print_and_parse(pipeline: Pipeline) -> None:
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.parse(str(pipeline)).content_id == pipeline.content_id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eliminate-noops,Outline", "column 17: expected a pass name"),
        ("eliminate-noops outline-layers", "column 16: expected ','"),
        ("fuse", r"unknown pass 'fuse'; known: address-kv, .*, schedule-layers$"),
        ('schedule-layers{"path":[0,}', "column 16: bad options of schedule-layers"),
        ('schedule-layers{"paths":[0]}', "bad options of schedule-layers.*paths"),
    ],
)
def test_malformed_pipelines_name_the_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline.parse(text)


def test_a_pipeline_records_what_each_pass_did() -> None:
    result = library_pipeline().run(noisy())
    assert [r.name for r in result.records] == [
        "eliminate-noops",
        "eliminate-dead-code",
        "outline-layers",
        "dedupe-layers",
    ]
    assert result.modified and all(r.modified and r.time_ms > 0 for r in result.records)
    assert result.records[-1].counts == {"layer graphs": "3 -> 2"}
    assert not Pipeline((PASSES["eliminate-noops"](),)).run(result.graph_module).modified


@dataclass(frozen=True)
class _Breaks(Pass):
    """Forgets the role of a placeholder, or fails."""

    name: ClassVar[str] = "breaks"
    fail: bool = False

    def run(self, gm: GraphModule) -> PassResult:
        if self.fail:
            raise PassError(self.name, "it met its match", "try another")
        new, graph = copy_graph_module(gm)
        next(iter(graph.nodes)).meta.pop("role")
        return PassResult(new, True)


def test_a_pass_that_breaks_the_graph_is_caught_between_passes() -> None:
    pipeline = Pipeline((PASSES["eliminate-noops"](), _Breaks(), PASSES["outline-layers"]()))
    with pytest.raises(VerifyError, match="input_ids has no role"):
        pipeline.run(noisy())
    with pytest.raises(PassError, match="breaks: it met its match; try another"):
        Pipeline((_Breaks(fail=True),)).run(noisy())

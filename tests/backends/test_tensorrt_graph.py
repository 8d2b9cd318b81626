"""Taking a region apart for TensorRT: which operators make engines, and what stays beside them."""

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from places import GOLDEN
from polar_fx.backends import EagerBackend, Region
from polar_fx.backends.experimental.tensorrt import export_engines, profile
from polar_fx.backends.experimental.tensorrt_graph import ENGINE_OPS, engines, split_for_engines
from polar_fx.compiled import CompiledModel
from polar_fx.explain.tensorrt_parts import EnginePart, partition_report, parts_of
from polar_fx.passes.base import is_size, writes
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.runner import Runner
from slow_cases import some_slow
from tiny_models import prompts, tiny

# sdpa; attention in operators with a cap; linear layers as addmm on flattened rows; experts
FAMILIES = ["llama", "gemma2", "gpt2", "mixtral"]

# Read from the sources in the wheels: parameters, and the operators that have a converter.
API: dict[str, dict[str, list[str]]] = json.loads(
    (GOLDEN / "torch_tensorrt.json").read_text(encoding="utf-8")
)


def _bodies(family: str) -> dict[str, GraphModule]:
    return tiny(family).library.bodies


class _Apart(EagerBackend):
    """Interprets regions that were taken apart."""

    def compile_region(self, body: GraphModule, example: Sequence[Tensor], dynamic: Any) -> Region:
        return super().compile_region(split_for_engines(body), example, dynamic)


@torch.no_grad()
def _answers(model: CompiledModel) -> list[Tensor]:
    """Logits of a ragged batch in two chunks, and of one row; tokens of a greedy decode by a
    program that repeats.
    """
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    for i, row in enumerate(prompts(11, 6)):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    many = model.generate(ids[:1], program="0 (1)*2 /4", max_new_tokens=4, do_sample=False)
    return [model.forward(ids, mask), model.forward(ids[:1], program="1-2 /4"), many]


@pytest.mark.parametrize("family", some_slow(FAMILIES, FAMILIES[1:]))
def test_a_region_taken_apart_computes_the_same_bits_and_writes_the_same_slots(family: str) -> None:
    """Prefill, decode and the last step's KV writes; a wrong slot would show in the next chunk or
    token.
    """
    model, library = tiny(family).model, tiny(family).library
    apart, whole = (
        CompiledModel(
            Runner.of_model(
                model, RegionTable(library, backend, max_length=31, store=None), prefill_chunk=8
            )
        )
        for backend in (_Apart(), EagerBackend())
    )
    for got, want in zip(_answers(apart), _answers(whole), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", some_slow(FAMILIES, FAMILIES[1:]))
def test_engines_hold_nothing_but_listed_operators_on_floating_tensors_shorter_than_a_slot(
    family: str,
) -> None:
    found = 0
    for name, body in _bodies(family).items():
        length = next(
            (str(n.meta["val"].shape[2]) for n in body.graph.nodes if n.meta.get("role") == "kv"),
            None,
        )
        for engine in engines(split_for_engines(body)).values():
            found += 1
            for node in engine.graph.nodes:
                if is_size(node) or node.op == "output":
                    continue
                if isinstance(node.target, torch._ops.OpOverload):
                    assert node.target._schema.name in ENGINE_OPS and not writes(node), name
                for value in (
                    node.meta["val"]
                    if isinstance(node.meta["val"], (list, tuple))
                    else [node.meta["val"]]
                ):
                    sizes = [str(n) for n in value.shape]
                    assert value.is_floating_point() and length not in sizes, (name, node)
    assert found >= 2, "a model without engines shows nothing"


def test_the_report_names_what_runs_where_and_counts_engines() -> None:
    report = partition_report(tiny("llama").library)
    kinds: dict[str, list[bool]] = {}
    for name, parts in report.parts.items():
        kinds[name] = [part.engine for part in parts]
    assert kinds == {
        "epilogue": [True],
        "layer_kind_0": [False, True, False, True],
        "layer_kind_0.kv": [False, True, False],
        "prologue": [False],
    }
    attention = EnginePart(False, {"aten::index_put_": 2, "aten::scaled_dot_product_attention": 1})
    assert report.parts["layer_kind_0"][2] == attention and report.num_engines == 4
    linear = [p.operators["aten::linear"] for p in report.parts["layer_kind_0"] if p.engine]
    assert linear == [3, 4], "q, k, v before attention; its output and the feed-forward after it"
    text = report.text()
    assert (
        f"  {attention}\n" in text
        and "aten::index_put_ ×2" in text
        and text.endswith("shared by all programs")
    )
    assert text.splitlines()[-1].startswith("4 engines")


def test_operators_can_be_kept_out_of_engines() -> None:
    body = _bodies("llama")["layer_kind_0"]
    parts = parts_of(split_for_engines(body, keep=["aten::silu"]))
    assert [p.engine for p in parts[-3:]] == [True, False, True] and parts[-2].operators == {
        "aten::silu": 1
    }
    assert not engines(split_for_engines(body, keep=["aten::linear"])), (
        "without a linear layer an engine is not worth it"
    )


class _Order(nn.Module):
    """Memory that is read, then written with an engine's result, then read again; no value leads
    from write to read.
    """

    def forward(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        memory, w = operands
        before = nn.functional.linear(memory * 2.0, w)
        memory.copy_(before)
        return (before + nn.functional.linear(memory * 3.0, w),)


def test_reads_and_writes_of_one_memory_keep_their_order() -> None:
    operands = [torch.randn(2, 4), torch.randn(4, 4)]
    body = torch.export.export(_Order(), (tuple(operands),)).graph_module
    mine, theirs = copy.deepcopy(operands), copy.deepcopy(operands)
    apart = split_for_engines(body)
    assert len(engines(apart)) == 2
    assert torch.equal(apart(*mine)[0], body(*theirs)[0])
    assert torch.equal(mine[0], theirs[0])


@functools.cache
def _exported_engines(family: str) -> tuple[ExportedProgram, ...]:
    """The parts of one kind of layer and of the head, for several rows of several tokens."""
    parts = [split_for_engines(_bodies(family)[name]) for name in ("layer_kind_0", "epilogue")]
    return tuple(
        e for part in parts for e in export_engines(part, {"batch": 8, "tokens": 512}).values()
    )


def test_profiles_span_the_shape_class_up_to_the_limits() -> None:
    first, _, head = _exported_engines("llama")
    hidden = {"min_shape": (2, 2, 32), "max_shape": (8, 512, 32), "dtype": torch.float32}
    for exported in (first, head):
        (described,) = [d for d in profile(exported) if d.items() >= hidden.items()][:1]
        assert all(
            2 <= n <= most for n, most in zip(described["opt_shape"], (8, 512, 32), strict=True)
        )
    assert {"shape": (16, 32), "dtype": torch.float32} in profile(first), (
        "weights are operands of fixed size"
    )
    assert (
        not first.graph_signature.parameters
        and not first.constants
        and not first.graph_signature.buffers
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch about copying its own values
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_operator_of_an_engine_has_a_converter_once_decomposed(family: str) -> None:
    for exported in _exported_engines(family):
        used = {
            _operator(n.target)
            for n in exported.run_decompositions().graph.nodes
            if n.op == "call_function"
        }
        assert used
        for version, api in API.items():
            assert used <= set(api["converters"]), (version, used - set(api["converters"]))


def _operator(target: Any) -> str:
    return (
        str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{target.__name__}"
    )

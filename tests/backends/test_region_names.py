"""Names of regions: a type, with one text form that manifests, records and jobs of workers hold."""

import itertools

import pytest

from polar_fx.backends.base import RegionName, ShapeClass

SHAPES = [ShapeClass(*sizes) for sizes in itertools.product((1, None), (1, None), (64, 0, None))]


@pytest.mark.parametrize("kv_writes", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_names_print_and_parse(shape: ShapeClass, kv_writes: bool) -> None:
    assert ShapeClass.parse(str(shape)) == shape
    name = RegionName("layer_kind_0", shape, kv_writes)
    assert RegionName.parse(str(name)) == name == RegionName.of(name.graph, shape)


def test_the_text_is_that_of_bundles_and_records_written_before() -> None:
    name = RegionName("layer_kind_12", ShapeClass(1, None, 528), kv_writes=True)
    assert (name.graph, str(name.shape)) == ("layer_kind_12.kv", "B=1 T=2+ L=528")
    assert str(name) == "layer_kind_12.kv for B=1 T=2+ L=528"
    assert RegionName.parse("prologue for B=2+ T=1 L=any") == RegionName(
        "prologue", ShapeClass(None, 1, None)
    )


def test_every_name_has_a_text_of_its_own() -> None:
    names = [
        RegionName(body, shape, kv_writes)
        for body in ("prologue", "layer_kind_0", "layer_kind_1")
        for shape in SHAPES
        for kv_writes in (False, True)
    ]
    assert len(set(names)) == len({str(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "prologue",
        "prologue for",
        " for B=1 T=1 L=64",
        ".kv for B=1 T=1 L=64",
        "layer_kind_0.kvs for B=1 T=1 L=64",
        "layer_kind_0.kv.kv for B=1 T=1 L=64",
        "prologue for B=7 T=1 L=64",
        "prologue for B=1 T=1 L=064",
        "prologue for B=1 T=1 L=",
        "prologue for B=1 T=1 L=64 ",
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no (region's name|class of shapes), such as"):
        RegionName.parse(text)

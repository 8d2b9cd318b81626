"""Recipes of mergekit whose `slices` stack layers of one model (a passthrough merge): read as a
program, and written from one.

mergekit copies the layers into a new model; a program runs the same layers in place.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, ProgramError
from .program import Program

_MAX_BYTES = 1 << 20


def from_mergekit(recipe: str | os.PathLike[str] | Mapping[str, Any], depth: int) -> Program:
    """The program that runs the slices of a recipe on a model of `depth` layers.

    `recipe` is a file, its YAML text (of several lines), or what YAML reads as. Raises InputError
    for what is no recipe of slices of one model, and ProgramError for layers that are not there.
    """
    said = recipe if isinstance(recipe, Mapping) else _read(recipe)
    slices: Any = said.get("slices")
    if not _is_list(slices) or not slices:
        raise InputError(
            "the recipe has no list `slices`; give one of mergekit's passthrough merges"
        )
    method = said.get("merge_method", "passthrough")
    if method != "passthrough":
        raise InputError(
            f"merge_method is {method!r}, which changes weights; a program can only stack layers, "
            "as 'passthrough' does"
        )
    several: list[Any] = slices
    sources = list(map(_source, several))
    names = {str(source.get("model")) for source in sources}
    if len(names) > 1:
        raise InputError(
            f"the recipe takes layers of {len(names)} models ({', '.join(sorted(names))}); a "
            "program runs those of one"
        )
    path: list[int] = []
    for source in sources:
        path += _layers(source.get("layer_range"), depth)
    return Program.from_path(path, depth)


def to_mergekit(program: Program, model: str, *, dtype: str = "bfloat16") -> str:
    """A recipe, as YAML text, by which mergekit copies the program's layers of `model` into a new
    model of `dtype`.

    Raises ProgramError for a program with damping, which no stack of layers computes.
    """
    if program.blends:
        raise ProgramError(
            f"program {program} has damping, which a stack of layers cannot compute; take a "
            "program without @"
        )
    import yaml

    slices = [
        {"sources": [{"model": model, "layer_range": [start, stop]}]}
        for start, stop in _runs(program.path)
    ]
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None)


def _read(recipe: str | os.PathLike[str]) -> Mapping[str, Any]:
    """A recipe of a file or text. Raises InputError."""
    import yaml

    text = os.fspath(recipe)
    if "\n" not in text:
        path = Path(text).expanduser()
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise InputError(f"{path} is no recipe: it has more than {_MAX_BYTES} bytes")
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"the recipe {path} cannot be read: {error}") from error
    try:
        found: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"the recipe is no YAML: {error}") from error
    if not _is_mapping(found):
        raise InputError("the recipe is no YAML mapping with a list `slices`")
    return found


def _source(each: Any) -> Mapping[str, Any]:
    """The one source of a slice. Raises InputError."""
    slice_: Mapping[str, Any] = each if _is_mapping(each) else {}
    sources: Any = slice_.get("sources")
    one: Any = sources[0] if _is_list(sources) and len(sources) == 1 else None
    if not _is_mapping(one):
        raise InputError(f"a slice has to name one source, got {each!r}")
    source: Mapping[str, Any] = one
    if source.get("parameters") or slice_.get("parameters"):
        raise InputError(
            "a slice has `parameters`, which change weights; a program runs layers as they are"
        )
    return source


def _layers(span: Any, depth: int) -> range:
    """`layer_range`, whose end does not count. Raises InputError and ProgramError."""
    ends: list[Any] = span if _is_list(span) and len(span) == 2 else [None, None]
    start, stop = ends
    if type(start) is not int or type(stop) is not int or not 0 <= start < stop:
        raise InputError(f"layer_range is {span!r}; give [first, last + 1], such as [0, 24]")
    if stop > depth:
        raise ProgramError(f"layer_range {span!r} ends after the model's {depth} layers")
    return range(start, stop)


def _runs(path: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The path as ranges of ascending layers, ends not included."""
    start = 0
    for at in range(1, len(path) + 1):
        if at == len(path) or path[at] != path[at - 1] + 1:
            yield path[start], path[at - 1] + 1
            start = at


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)

"""Whose keys and values each step of a program reads."""

from collections.abc import Mapping

from ..errors import ProgramError
from .program import Program


def slot_steps(program: Program, owners: Mapping[int, int]) -> list[int]:
    """For each step the one whose slot it takes: itself, or, of a layer that `owners` maps to the
    layer whose keys and values it reads, the latest step of that one before it.

    Raises ProgramError if there is none.
    """
    latest: dict[int, int] = {}
    found: list[int] = []
    for step, layer in enumerate(program.path):
        owner = owners.get(layer, layer)
        if owner == layer:
            latest[layer] = step
        elif owner not in latest:
            raise ProgramError(
                f"layer {layer} reads the keys and values of layer {owner}, which program "
                f"{program} skips before it; keep layer {owner} before layer {layer}"
            )
        found.append(latest[owner])
    return found

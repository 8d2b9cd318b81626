"""Where keys and values lie in blocks, and how long a row may be unless the user says so."""

from transformers import PreTrainedModel

from ..backends import Backend
from ..capture.rotary import frequency_switch
from ..capture.support import position_limit
from ..library import LayerLibrary
from .tiers import Tier

IN_SLOTS = 1024  # tokens; slots cost memory and time for all that they may hold


def takes_blocks(library: LayerLibrary, backend: Backend) -> bool:
    """Whether regions can take keys and values by address, in blocks, in a call of any rows.

    They do on the CPU and on CUDA, but not by TensorRT, in a bundle whose regions are compiled for
    slots, for models that fold rows into another axis, and for those that keep states.
    """
    if library.table.keeps_states:
        return False
    by_address = library.device.type in ("cpu", "cuda") and backend.by_address
    return by_address and library.table.batch_axes() is not None


def default_row_length(
    model: PreTrainedModel, library: LayerLibrary, *, backend: Backend, tier: Tier
) -> int:
    """The model's own limit where keys and values lie in blocks, which cost what is there; up to
    where it would compute rows with other rotary frequencies, which takes slots.

    In slots, which on a GPU hold rows of one program, or without a limit, at most 1,024.
    """
    limit, switch = position_limit(model), frequency_switch(model.config)
    in_slots = library.device.type == "cuda" or not takes_blocks(library, backend)
    if limit is None or tier != "linked" or in_slots:
        return min(IN_SLOTS, limit or IN_SLOTS)
    return limit if switch is None else min(limit, switch)

"""Why a model cannot be traced, in a sentence that names the part of it that is in the way.

What torch or the modeling code raised there is kept as the cause of the error, and in the log.
"""

import traceback
from types import FunctionType

import torch
from torch import nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedConfig, PreTrainedModel


class OtherStateError(Exception):
    """A layer asks its cache for something else than keys and values."""


class RowLengthError(Exception):
    """Code computes with the number of tokens that came before as if it were one for all rows."""


_BY_ROW = "computes with how many tokens came before, which differs from row to row"


def _part(error: Exception, model: nn.Module) -> str | None:
    """The innermost module of the model that ran when the error was raised: its class and path."""
    paths = {id(m): name for name, m in model.named_modules() if name}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in paths:
            found = f"its {type(owner).__name__} {paths[id(owner)]}"
    return found


@torch.no_grad()
def why_it_does_not_run(error: Exception, view: PreTrainedModel) -> str:
    """Of an error while two tokens ran with a cache that notes keys and values."""
    part = _part(error, view) or "a layer"
    if isinstance(error, OtherStateError):
        return f"{part} keeps recurrent or convolutional state"
    if isinstance(error, RowLengthError):
        return f"{part} {_BY_ROW}"
    for module in view.modules():  # the attention of its own, which asks for no mask of ours
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._attn_implementation_internal = "eager"
    try:
        view(input_ids=torch.zeros(1, 2, dtype=torch.long, device=view.device), use_cache=False)
    except Exception as own:
        return (
            "the model itself cannot run two tokens, with no cache either: "
            f"{str(own).strip().partition(chr(10))[0] or type(own).__name__}"
        )
    return f"{part} asks its cache for more than keys and values of the layer"


def why_it_is_not_traced(error: Exception, view: nn.Module) -> str:
    """Of an error while the whole model was traced."""
    part = _part(error, view)
    if isinstance(error, RowLengthError):
        what = _BY_ROW
    elif isinstance(error, GuardOnDataDependentSymNode):
        what = "decides by the values of tensors, such as the largest position of a batch"
    elif part is None or isinstance(error, UserError):
        # found after the last operator: no module is running any more
        what = "fixes the number of rows, tokens or KV columns, which have to be free"
        part = part or "its code"
    else:
        what = "computes with sizes or lengths in a way that one graph for all sizes cannot hold"
    return f"{part or 'its code'} {what}{replaced_forward(view)}"


def replaced_forward(view: nn.Module) -> str:
    """A remark on the first module whose forward is a function of somebody's own, if there is one:
    a function is not copied, and holds on to the modules that it was made with.
    """
    for name, module in view.named_modules():
        if isinstance(vars(module).get("forward"), FunctionType):
            return (
                f", and forward of {name or 'the model'} was replaced by a function, which may "
                "call other modules than those that are traced: replace it after compiling, or "
                "in the class"
            )
    return ""

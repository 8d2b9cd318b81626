"""Whether a model still holds the tensors that were bound when it was compiled.

Compiled programs read the model's own tensors, so what is written into them in place is seen. A
tensor that is exchanged (`load_state_dict(assign=True)`, `p.data = ...`, another layer,
`model.to(...)`) is not: such a model is refused.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import WeightsReplacedError

# A dictionary of a module, a key in it, what stood there, its address if it is a tensor, and its
# name.
_Place = tuple[dict[str, Any], str, Any, int, str]


class BoundWeights:
    """What stood on the way to each weight when it was bound. `check` costs a fraction of a
    microsecond a weight.

    The model is not kept alive: nobody can exchange the weights of one that is gone.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = weakref.ref(model)
        names = tuple(names)
        self._places = tuple(self._find(model, names))
        # a stack of layers may become longer, and each of those that were bound stay
        lists = []
        for path, module in model.named_modules():
            is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
            if is_list and any(name.startswith(f"{path}.") for name in names):
                lists.append((path, module._modules, len(module)))
        self._lists = tuple(lists)

    def _find(self, model: nn.Module, names: Iterable[str]) -> list[_Place]:
        found: dict[tuple[int, str], _Place] = {}
        everywhere: dict[int, list[str]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            everywhere.setdefault(id(weight), []).append(name)
        tied = {name: same for same in everywhere.values() for name in same}
        for full in dict.fromkeys(alias for name in names for alias in tied.get(name, [name])):
            owner, path = model, ""
            for part in full.split("."):
                path = f"{path}.{part}" if path else part
                held = next(
                    (
                        of
                        for of in (owner._modules, owner._parameters, owner._buffers)
                        if of.get(part) is not None
                    ),
                    None,
                )
                # a part of a quantized weight, or a constant of the trace: all that its module
                # holds counts
                if held is None:
                    for name, value in owner._parameters.items():
                        found[id(owner._parameters), name] = (
                            owner._parameters,
                            name,
                            value,
                            _address(value),
                            path,
                        )
                    break
                # models exchange these themselves, such as rotary frequencies
                if part in owner._non_persistent_buffers_set:
                    break
                value = held[part]
                found[id(held), part] = (held, part, value, _address(value), path)
                if not isinstance(value, nn.Module):
                    break
                owner = value
        return list(found.values())

    def check(self) -> None:
        """Raise WeightsReplacedError, naming the first place, if a weight is not the one that was
        bound.
        """
        if self._model() is None:
            return
        for held, key, value, address, path in self._places:
            if held.get(key) is not value or (address and value.data_ptr() != address):
                raise WeightsReplacedError(
                    f"{path} of the model is not what it was when the model was compiled: it was "
                    "replaced, and compiled programs would go on with the old weights; compile "
                    "the model again, or change weights in place (copy_, load_state_dict without "
                    "assign=True)"
                )
        for path, modules, count in self._lists:
            if len(modules) != count:
                raise WeightsReplacedError(
                    f"{path} of the model has {len(modules)} modules and not the {count} that were "
                    "compiled, which would run all the same; compile the model again"
                )

    @property
    def version(self) -> int:
        """A number that changes when a weight is changed in place, as far as autograd sees it
        (`p.data` hides it).
        """
        values = (value for _, _, value, _, _ in self._places)
        return sum(v._version for v in values if isinstance(v, Tensor) and not v.is_inference())


def _address(value: Any) -> int:
    """Where a plain tensor's values lie; 0 for anything else, which is only compared by
    identity.
    """
    return (
        value.data_ptr()
        if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter, nn.Buffer)
        else 0
    )

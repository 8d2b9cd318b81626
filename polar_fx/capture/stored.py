"""What the layers of a model store, as a run with a recording cache shows it: which layer keeps
what, and under which numbers of the cache.

Modeling code names what it stores by numbers that are its own affair: usually that of the layer,
but a layer with several attentions has several. Each has to be written by one layer, once.
"""

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .captured import ColumnsSpec, KvSpec, StateSpec
from .extension import CACHE, INDEX, KV, Part, Recorder, Running, Store
from .reasons import RowLengthError, why_it_does_not_run
from .support import embedding_weight, position_limit

log = logging.getLogger("polar_fx.capture")


class _ReadOnlyWeights(TorchDispatchMode):
    """Some models rescale their weights in their first forward pass; a view must not do that to the
    user's model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func._schema.is_mutable
            and args
            and isinstance(args[0], Tensor)
            and args[0].untyped_storage().data_ptr() in self.storages
        ):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} changes its weights in its forward pass",
                "pass a model that only reads them",
            )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watched(view: PreTrainedModel, stack: str, *, recorder: Recorder) -> Iterator[list[Tensor]]:
    """The hidden states that layers hand on inside the block, in the order in which they run; the
    recorder is told what runs.
    """
    found: list[Tensor] = []
    runs: Counter[int] = Counter()
    layers = cast(nn.ModuleList, view.get_submodule(stack))
    numbers: dict[int, int] = {}
    for number, layer in enumerate(layers):
        numbers.setdefault(id(layer), number)
    paths = {id(module): path for path, module in view.named_modules()}
    before: list[Running] = []

    def enter(module: nn.Module, given: Any) -> None:
        now = recorder.running
        before.append(now)
        layer, run = now.layer, now.run
        if id(module) in numbers:
            layer = numbers[id(module)]
            run = runs[layer]
            runs[layer] += 1
        recorder.running = Running(type(module).__name__, paths[id(module)], layer, run)

    def leave(module: nn.Module, given: Any, result: Any) -> None:
        recorder.running = before.pop()
        first = result[0] if isinstance(result, (tuple, list)) else result
        if id(module) in numbers and isinstance(first, Tensor):
            found.append(first)

    modules = list(view.modules())
    hooks = [module.register_forward_pre_hook(enter) for module in modules]
    hooks += [module.register_forward_hook(leave) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _check_handed_on(view: PreTrainedModel, states: list[Tensor]) -> None:
    """Raise UnsupportedModelError unless all have an axis of one row, one of two tokens, and more;
    which these are, the traced sizes tell.
    """
    for state in states:
        if state.dim() < 3 or not {1, 2} <= set(state.shape):
            raise UnsupportedModelError(
                f"layers of {type(view).__name__} hand on hidden states of shape "
                f"{list(state.shape)} for one row of two tokens, not [1, 2, d]",
                "rows and tokens are told apart by axes of their own; use a model whose hidden "
                "states are [batch, tokens, d], or of several such streams",
            )


def probe(view: PreTrainedModel, stack: str, *, depth: int) -> "Stored":
    """Run two tokens through the view and see what every layer stores of its own, once, and that it
    hands on a hidden state with an axis of rows and one of tokens.
    """
    device = embedding_weight(view).device
    positions = torch.arange(2, device=device)[None]
    recorder = Recorder(positions, 2, depth=depth)
    recorder.limit = position_limit(view)
    try:
        watched = _watched(view, stack, recorder=recorder)
        with torch.no_grad(), _ReadOnlyWeights(view), watched as states:
            view(
                input_ids=torch.zeros_like(positions),
                attention_mask=torch.ones_like(positions),
                position_ids=positions,
                use_cache=True,
                **{CACHE: recorder},
            )
    except UnsupportedModelError:
        raise
    except Exception as error:
        log.info("%s failed in its probe: %r", type(view).__name__, error)
        raise UnsupportedModelError(
            f"{type(view).__name__} does not run with one slot per layer: "
            f"{why_it_does_not_run(error, view)}",
            "use one whose positions are the same sums for any row"
            if isinstance(error, RowLengthError)
            else "use one that hands what its layers keep to its cache, as models of transformers "
            "5.24 do",
        ) from error
    stored = Stored(view, recorder.stores, stack=stack, depth=depth)
    _check_handed_on(view, states)
    return stored


class Stored:
    """What each layer of a model stores, as a run with a recording cache has shown it.

    `parts` has the tensors of each layer by the number of the cache and by what they are.
    """

    def __init__(
        self, view: PreTrainedModel, stores: Sequence[Store], *, stack: str, depth: int
    ) -> None:
        self.name, self.stack = type(view).__name__, stack
        self.parts: list[dict[_Key, tuple[Tensor, ...]]] = [{} for _ in range(depth)]
        self._check_runs(stores)
        # what runs outside of all layers goes by its number, and has to fit there
        layers = [s.number if s.by.layer is None else s.by.layer for s in stores]
        self._check_numbers(layers, stores)
        for layer, store in zip(layers, stores, strict=True):
            self.parts[layer][store.number, store.part] = store.tensors
        self.silent = [layer for layer, parts in enumerate(self.parts) if not parts]
        if len(self.silent) == depth:
            raise self.refused_silence()

    def _check_runs(self, stores: Sequence[Store]) -> None:
        """Raise UnsupportedModelError if a layer stores something each time that it runs, and runs
        more than once.
        """
        numbers: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for store in stores:
            if store.by.layer is not None:
                numbers[store.by.layer][store.by.run].append(store.number)
        for layer, runs in numbers.items():
            if len(runs) > 1:
                found = list(dict.fromkeys(n for own in runs.values() for n in own))
                raise UnsupportedModelError(
                    f"{self.name}: layer {layer} of {self.stack} runs {len(runs)} times in one "
                    f"forward pass, and stores under the numbers {found} of its cache",
                    "a program says how often a layer runs; use a model whose own forward pass "
                    "runs each of its layers once",
                )

    def _check_numbers(self, layers: Sequence[int], stores: Sequence[Store]) -> None:
        """Raise UnsupportedModelError unless every number is that of one layer, which stores each
        part of its slot once, and layers store in their order.
        """
        depth, owners = len(self.parts), dict[int, int]()
        for layer, store in zip(layers, stores, strict=True):
            if layer >= depth:
                raise self._unsound(
                    f"its {store.by.kind} {store.by.path} stores KV under number {store.number}, "
                    f"outside of the {depth} layers of {self.stack}"
                )
            if (other := owners.setdefault(store.number, layer)) != layer:
                raise self._unsound(
                    f"layers {other} and {layer} of {self.stack} both store KV under number "
                    f"{store.number}"
                )
        if list(layers) != sorted(layers):
            raise self._unsound(f"layers store KV in the order {layers}")
        counts = Counter((store.number, store.part) for store in stores)
        for (number, part), count in counts.items():
            if count > 1:
                raise self._unsound(
                    f"layer {owners[number]} of {self.stack} stores {count} times under number "
                    f"{number} ({part[0]})"
                )

    def refused_silence(self) -> UnsupportedModelError:
        """The error for layers that store nothing of their own, and need something all the same."""
        return self._unsound(f"layers {self.silent} store no keys and values of their own")

    def _unsound(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.name}: {what} (shared KV, or state of another kind)",
            "skipping or repeating layers of such a model is unsound; use one where every layer "
            "owns its KV",
        )

    @property
    def specs(self) -> tuple[KvSpec, ...]:
        """The geometry of each layer's slot, its parts in the order of `slots`."""
        return tuple(map(_spec, self.parts))

    def slots(self, tensors: Iterable[Tensor]) -> list[dict[Part, list[Tensor]]]:
        """The tensors of all slots, which are given one layer after another, as the cache hands
        them out: by number and part.
        """
        given = iter(tensors)
        count = len(self.parts)
        for number, _ in (key for parts in self.parts for key in parts):
            count = max(count, number + 1)
        found: list[dict[Part, list[Tensor]]] = [{} for _ in range(count)]
        for parts in self.parts:
            for number, part in sorted(parts, key=_columns_first):
                found[number][part] = [next(given) for _ in parts[number, part]]
        return found


_Key = tuple[int, Part]  # a number of the cache, and what is kept under it


def _columns_first(key: _Key) -> tuple[bool, bool, int, Part]:
    """The order of a slot's parts: keys and values, further keys, and states."""
    number, part = key
    return part != KV, part != INDEX, number, part


def _spec(parts: dict[_Key, tuple[Tensor, ...]]) -> KvSpec:
    ordered = [(key[1], parts[key]) for key in sorted(parts, key=_columns_first)]
    kept = [stored[0] for part, stored in ordered if part not in (KV, INDEX)]
    states = tuple(StateSpec(tuple(state.shape[1:]), state.dtype) for state in kept)
    columns = [tensor for part, stored in ordered if part in (KV, INDEX) for tensor in stored]
    own = 2 if any(part == KV for part, _ in ordered) else 0  # the first keys and values
    more = tuple(ColumnsSpec(t.shape[1], t.shape[3], t.dtype) for t in columns[own:])
    if not own:
        dtype = next((part.dtype for part in (*more, *states)), torch.float32)
        return KvSpec(0, 0, 0, dtype, states, more)
    keys, values = columns[:own]
    return KvSpec(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, states, more)

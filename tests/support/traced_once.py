"""Equal models are traced once in a process of tests: a tiny model's trace takes a second, and most
tests are of what comes after it.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
from torch.fx import Graph, GraphModule
from transformers import PreTrainedModel

from polar_fx.capture import CapturedModel, trace
from polar_fx.library.cached import tensors_of
from polar_fx.library.model_facts import UnknownFactError, model_facts
from polar_fx.output.digest import digest

_MOST = 32  # graphs that are kept, without weights
capture_anew = trace._capture


class _Known(NamedTuple):
    captured: CapturedModel  # without its graph
    graph: Graph


def _targets(graph: Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "get_attr"}


def _is_of_the_model(captured: CapturedModel, model: PreTrainedModel) -> bool:
    """Whether all tensors of the graph are found in the model by their names."""
    module = captured.graph_module
    held = tensors_of(module, _targets(module.graph))
    try:
        own = tensors_of(model, held)
    except AttributeError:
        return False
    return all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in held.items())


def _with_weights_of(model: PreTrainedModel, known: _Known) -> CapturedModel:
    tensors = tensors_of(model, _targets(known.graph))
    module = GraphModule(tensors, _copy(known.graph), class_name="Flat")
    return replace(known.captured, graph_module=module)


def _without_weights(captured: CapturedModel) -> _Known:
    empty = GraphModule({}, Graph())
    return _Known(replace(captured, graph_module=empty), _copy(captured.graph_module.graph))


def _copy(graph: Graph) -> Graph:
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    return new


class TracedOnce:
    """In place of `trace._capture`."""

    def __init__(self) -> None:
        self.known: OrderedDict[str, _Known] = OrderedDict()

    def __call__(self, model: PreTrainedModel, attention: str | None) -> CapturedModel:
        try:
            key = digest({**model_facts(model), "chosen": attention})
        except (UnknownFactError, RecursionError):
            return capture_anew(model, attention)
        if key in self.known:
            self.known.move_to_end(key)
            return _with_weights_of(model, self.known[key])
        captured = capture_anew(model, attention)
        if _is_of_the_model(captured, model):
            self.known[key] = _without_weights(captured)
            if len(self.known) > _MOST:
                self.known.popitem(last=False)
        return captured


@contextlib.contextmanager
def models_traced_once() -> Iterator[None]:
    """Within it, `capture` takes the graph of an equal model that was traced before.

    Such graphs share the symbols of their sizes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_capture", TracedOnce())
        yield


@contextlib.contextmanager
def models_traced_anew() -> Iterator[None]:
    """Within it, `capture` traces every model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_capture", capture_anew)
        yield

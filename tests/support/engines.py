"""Models whose engines are tested, interpreted, and how an engine is run to its end."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from polar_fx.compiled import CompiledModel, compile
from polar_fx.engine import Engine
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration
from tiny_models import make

FAMILIES = ("llama", "gemma3_text", "qwen2_moe", "gpt2")
PROGRAMS = ("identity", "skip 1", "repeat 0-1 x2 @0.5", "repeat 1 x3")


@functools.cache
def compiled(family: str = "llama", deterministic: bool = False) -> CompiledModel:
    options: dict[str, Any] = {"max_length": 100, "cache": False, "deterministic": deterministic}
    return compile(make(family), "eager", **options)


def run(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


class ByLength:
    """A row of n tokens runs program n mod 3 of the menu."""

    features, calibration = Features(1), Calibration(0.5)

    def __init__(self, model: CompiledModel) -> None:
        self.depth = model.depth
        self.menu = Menu.of([model.resolve(p) for p in ("repeat 1 x3", "skip 2")], model.depth)

    def propose(self, hidden: Sequence[Tensor]) -> list[Proposal]:
        return [
            Proposal(self.menu.programs, self.menu.steps, np.eye(len(self.menu))[len(h) % 3])
            for h in hidden
        ]


@functools.cache
def dispatched_by_length() -> CompiledModel:
    """A model whose dispatcher chooses by the length of the prompt, after one step."""
    model = compile(make("llama"), "eager", max_length=100, cache=False)
    model.dispatch_by(ByLength(model), policy="accuracy").warmup()
    return model

"""A whole program as one graph: exported bodies called in order and exported again as one (tier 1).

Only exported bodies are needed, no model and no weights, so a worker process can do it.

Shape legend: B batch (1), T tokens, d hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..library.steps import Chain, Code, Step
from .base import Dynamic, PersistentBackend
from .specialize import like

T = TypeVar("T")


@dataclass(frozen=True)
class WholeStep:
    """One step: the body it runs, its sides and weights by number, and the blends that open before
    and close after it.
    """

    target: str
    sides: Sequence[int]
    weights: Sequence[int]
    opens: int
    closes: Sequence[float]

    def bound(self, code: Code[T], weights: Sequence[T]) -> Step[T]:
        """The step on these weights of the program."""
        own = [weights[i] for i in self.weights]
        return Step(code, self.sides, own, self.opens, self.closes)


@dataclass(frozen=True)
class WholePlan:
    """A program over exported bodies.

    `prefill` says that T tokens come in and the logits of token `where` are wanted; else one token
    comes in. `bodies` maps names to files: those of one token under their own names, those of T
    tokens with a `*` after the name, and the last step's KV writes for T tokens as `kv`. Weights
    go by number, from 0 to `num_weights` - 1.
    """

    prefill: bool
    bodies: dict[str, str]
    num_weights: int
    prologue: Sequence[int]
    steps: tuple[WholeStep, ...]
    epilogue: WholeStep

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "WholePlan":
        steps = tuple(WholeStep(**step) for step in plain["steps"])
        return cls(**{**plain, "steps": steps, "epilogue": WholeStep(**plain["epilogue"])})


class WholeProgram(torch.nn.Module):
    """Operands: input_ids, positions, kv_index, [where,] the slots of every step, the distinct
    weights; logits [1, 1, V].
    """

    def __init__(
        self, plan: WholePlan, bodies: Mapping[str, Callable[..., Sequence[Tensor]]]
    ) -> None:
        super().__init__()
        self.plan, self.bodies = plan, bodies

    def forward(self, *operands: Tensor) -> Tensor:
        plan = self.plan
        inputs, rest = operands[:3], operands[3 + plan.prefill :]
        slots, weights = rest[: 2 * len(plan.steps)], rest[2 * len(plan.steps) :]
        pairs = list(zip(slots[::2], slots[1::2], strict=True))
        one = self._chain(weights, "")
        if not plan.prefill:
            return one.run(inputs, pairs)
        many = replace(self._chain(weights, "*"), kv_writes=self._code("kv"), one=one)
        return many.run(inputs, pairs, lambda value: value.index_select(1, operands[3]))

    def _chain(self, weights: Sequence[Tensor], suffix: str) -> Chain[Tensor]:
        """The program on the bodies of that suffix."""
        plan = self.plan
        return Chain(
            self._code(f"prologue{suffix}"),
            [weights[i] for i in plan.prologue],
            tuple(step.bound(self._code(step.target + suffix), weights) for step in plan.steps),
            plan.epilogue.bound(self._code(plan.epilogue.target), weights),
            torch.lerp,
        )

    def _code(self, name: str) -> Code[Tensor]:
        return lambda operands: self.bodies[name](*operands)


def compose(backend: PersistentBackend, plain: dict[str, Any], folder: Path) -> None:
    """Write the graph of a whole program into `folder`, ready for `backend.build`."""
    plan = WholePlan.from_dict(plain)
    bodies = {name: torch.export.load(path).graph_module for name, path in plan.bodies.items()}
    example = _example(plan, bodies)
    if plan.prefill:
        example.insert(3, torch.zeros(1, dtype=torch.long, device=example[0].device))
    varies = {1: "tokens"} if plan.prefill else {}
    dynamic: Dynamic = [varies, varies, *({} for _ in example[2:])]
    with torch.no_grad():
        backend.export(WholeProgram(plan, bodies), example, dynamic, folder)  # type: ignore[arg-type]


def _example(plan: WholePlan, bodies: Mapping[str, GraphModule]) -> list[Tensor]:
    """Graph inputs, slots and weights, each laid out as the bodies take it."""
    inputs, slots = _labels("input", 3), _labels("slot", 2 * len(plan.steps))
    weights = _labels("weight", plan.num_weights)
    found: dict[Any, Tensor] = {}

    def note(name: str, taken: Sequence[Any]) -> None:
        operands = bodies[name].graph.find_nodes(op="placeholder")
        found.update(zip(taken, [like(n.meta["val"]) for n in operands], strict=True))

    def note_step(step: WholeStep, slot: Sequence[Any] = ()) -> None:
        sides = range(1 + max(step.sides, default=0))  # which are made inside
        note(step.target, step.bound(_no_code, weights).operands("hidden", sides, slot))

    start = "prologue*" if plan.prefill else "prologue"
    note(start, [*inputs, *(weights[i] for i in plan.prologue)])
    for number, step in enumerate(plan.steps):
        note_step(step, slots[2 * number : 2 * number + 2])
    note_step(plan.epilogue)
    return [found[operand] for operand in (*inputs, *slots, *weights)]


def _labels(role: str, number: int) -> list[tuple[str, int]]:
    return [(role, i) for i in range(number)]


def _no_code(operands: list[Any]) -> Sequence[Any]:
    raise AssertionError("only asked what it takes")

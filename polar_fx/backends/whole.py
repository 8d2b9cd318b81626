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
from .base import Dynamic, PersistentBackend, RegionName, ShapeClass
from .specialize import like, load_graph

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
    """A program over exported bodies, for one shape class of one row.

    Of several tokens, the logits of token `where` alone are wanted. `bodies` maps the regions that
    a run calls to files of their graphs. Weights go by number, from 0 to `num_weights` - 1.
    """

    shape: ShapeClass
    bodies: dict[RegionName, str]
    num_weights: int
    prologue: WholeStep
    steps: tuple[WholeStep, ...]
    epilogue: WholeStep

    @property
    def prefill(self) -> bool:
        return self.shape.tokens != 1

    @property
    def kv_writes(self) -> RegionName:
        """What the last step of a prefill is for all tokens."""
        return RegionName(self.steps[-1].target, self.shape, kv_writes=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` is the inverse."""
        return {
            "shape": str(self.shape),
            "bodies": {str(name): path for name, path in self.bodies.items()},
            "num_weights": self.num_weights,
            "prologue": asdict(self.prologue),
            "steps": list(map(asdict, self.steps)),
            "epilogue": asdict(self.epilogue),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "WholePlan":
        bodies = {RegionName.parse(name): path for name, path in plain["bodies"].items()}
        return cls(
            ShapeClass.parse(plain["shape"]),
            bodies,
            plain["num_weights"],
            WholeStep(**plain["prologue"]),
            tuple(WholeStep(**step) for step in plain["steps"]),
            WholeStep(**plain["epilogue"]),
        )


class WholeProgram(torch.nn.Module):
    """Operands: input_ids, positions, kv_index, [where,] the slots of every step, the distinct
    weights; logits [1, 1, V].
    """

    def __init__(
        self, plan: WholePlan, bodies: Mapping[RegionName, Callable[..., Sequence[Tensor]]]
    ) -> None:
        super().__init__()
        self.plan, self.bodies = plan, bodies

    def forward(self, *operands: Tensor) -> Tensor:
        plan = self.plan
        inputs, rest = operands[:3], operands[3 + plan.prefill :]
        slots, weights = rest[: 2 * len(plan.steps)], rest[2 * len(plan.steps) :]
        pairs = list(zip(slots[::2], slots[1::2], strict=True))
        one = self._chain(weights, plan.shape.decode)
        if not plan.prefill:
            return one.run(inputs, pairs)
        kv_writes = self._code(plan.kv_writes)
        many = replace(self._chain(weights, plan.shape), kv_writes=kv_writes, one=one, num_last=1)
        return many.run(inputs, pairs, pick=lambda value: value.index_select(1, operands[3]))

    def _chain(self, weights: Sequence[Tensor], shape: ShapeClass) -> Chain[Tensor]:
        def bound(step: WholeStep) -> Step[Tensor]:
            return step.bound(self._code(RegionName(step.target, shape)), weights)

        start, steps = bound(self.plan.prologue), tuple(map(bound, self.plan.steps))
        return Chain(start.code, start.weights, steps, bound(self.plan.epilogue), torch.lerp)

    def _code(self, name: RegionName) -> Code[Tensor]:
        return lambda operands: self.bodies[name](*operands)


def compose(backend: PersistentBackend, plain: dict[str, Any], *, folder: Path) -> None:
    """Write the graph of a whole program into `folder`, ready for `backend.build`."""
    plan = WholePlan.from_dict(plain)
    bodies = {name: load_graph(Path(path)).graph_module for name, path in plan.bodies.items()}
    example = _example(plan, bodies)
    if plan.prefill:
        example.insert(3, torch.zeros(1, dtype=torch.long, device=example[0].device))
    varies = {1: "tokens"} if plan.prefill else {}
    dynamic: Dynamic = [varies, varies, *({} for _ in example[2:])]
    with torch.no_grad():
        backend.export(WholeProgram(plan, bodies), example, dynamic, folder)  # type: ignore[arg-type]


def _example(plan: WholePlan, bodies: Mapping[RegionName, GraphModule]) -> list[Tensor]:
    """Graph inputs, slots and weights, each laid out as the bodies take it."""
    inputs, slots = _labels("input", 3), _labels("slot", 2 * len(plan.steps))
    weights = _labels("weight", plan.num_weights)
    found: dict[Any, Tensor] = {}

    def note(name: RegionName, taken: Sequence[Any]) -> None:
        operands = bodies[name].graph.find_nodes(op="placeholder")
        found.update(zip(taken, [like(n.meta["val"]) for n in operands], strict=True))

    def taken_by(step: WholeStep, slot: Sequence[Any] = ()) -> list[Any]:
        sides = range(1 + max(step.sides, default=0))  # which are made inside
        return step.bound(_no_code, weights).operands("hidden", sides, slot=slot)

    start, head = plan.prologue, plan.epilogue
    note(RegionName(start.target, plan.shape), [*inputs, *(weights[i] for i in start.weights)])
    for number, step in enumerate(plan.steps):
        last = plan.prefill and number == len(plan.steps) - 1
        name = plan.kv_writes if last else RegionName(step.target, plan.shape)
        note(name, taken_by(step, slots[2 * number : 2 * number + 2]))
    note(RegionName(head.target, plan.shape.decode), taken_by(head))
    return [found[operand] for operand in (*inputs, *slots, *weights)]


def _labels(role: str, number: int) -> list[tuple[str, int]]:
    return [(role, i) for i in range(number)]


def _no_code(operands: list[Any]) -> Sequence[Any]:
    raise AssertionError("only asked what it takes")

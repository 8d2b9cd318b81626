"""A whole program as one graph: exported bodies called in order and exported again as one (tier 1).

Only exported bodies are needed, no model and no weights, so a worker process can do it.

Shape legend: B batch (1), T tokens, d hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Dynamic, PersistentBackend
from .specialize import like, load_graph


@dataclass(frozen=True)
class WholeStep:
    """One step: the body it runs, its sides and weights by number, and the blends that open before
    and close after it.
    """

    target: str
    sides: tuple[int, ...]
    weights: tuple[int, ...]
    opens: int
    closes: tuple[float, ...]


@dataclass(frozen=True)
class WholePlan:
    """A program over exported bodies.

    `prefill` says that T tokens come in and the logits of token `where` are wanted; else one token
    comes in. `bodies` maps names to files: those of one token under their own names, those of T
    tokens with a `*` behind the name, and the last step's KV writes for T tokens as `kv`.
    """

    prefill: bool
    bodies: dict[str, str]
    prologue: tuple[int, ...]
    steps: tuple[WholeStep, ...]
    epilogue: WholeStep

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "WholePlan":
        def step(s: dict[str, Any]) -> WholeStep:
            return WholeStep(
                s["target"], tuple(s["sides"]), tuple(s["weights"]), s["opens"], tuple(s["closes"])
            )

        steps = tuple(step(s) for s in plain["steps"])
        return cls(
            plain["prefill"],
            plain["bodies"],
            tuple(plain["prologue"]),
            steps,
            step(plain["epilogue"]),
        )


class _Whole(torch.nn.Module):
    """Operands: input_ids, positions, kv_index, [where,] the slots of every step, the distinct
    weights; logits [1, 1, V].
    """

    def __init__(self, plan: WholePlan, bodies: Mapping[str, torch.fx.GraphModule]) -> None:
        super().__init__()
        self.plan, self.bodies = plan, bodies

    def forward(self, *operands: Tensor) -> Tensor:
        plan, star = self.plan, "*" if self.plan.prefill else ""
        inputs, rest = list(operands[:3]), list(operands[3 + plan.prefill :])
        slots, weights = rest[: 2 * len(plan.steps)], rest[2 * len(plan.steps) :]

        def run(name: str, *values: Tensor, of: Sequence[int]) -> Sequence[Tensor]:
            return self.bodies[name](*values, *(weights[i] for i in of))

        values = [*inputs, *run(f"prologue{star}", *inputs, of=plan.prologue)]
        hidden = values[3]
        saved: list[Tensor] = []
        for number, step in enumerate(plan.steps):
            saved += [hidden] * step.opens
            kv = slots[2 * number : 2 * number + 2]
            name = step.target + star
            if plan.prefill and number == len(plan.steps) - 1:
                run("kv", hidden, *(values[i] for i in step.sides), *kv, of=step.weights)
                where = operands[3]
                hidden, saved = (
                    hidden.index_select(1, where),
                    [s.index_select(1, where) for s in saved],
                )
                inputs = [i.index_select(1, where) for i in inputs[:2]] + inputs[2:]
                values = [*inputs, *run("prologue", *inputs, of=plan.prologue)]
                name = step.target
            hidden = run(name, hidden, *(values[i] for i in step.sides), *kv, of=step.weights)[0]
            for damping in step.closes:
                hidden = torch.lerp(saved.pop(), hidden, damping)
        return run(
            "epilogue", hidden, *(values[i] for i in plan.epilogue.sides), of=plan.epilogue.weights
        )[0]


def compose(backend: PersistentBackend, plain: dict[str, Any], folder: Path) -> None:
    """Write the graph of a whole program into `folder`, ready for `backend.build`."""
    plan = WholePlan.from_dict(plain)
    bodies = {name: load_graph(Path(path)).graph_module for name, path in plan.bodies.items()}

    def operands(name: str) -> list[Tensor]:
        return [like(n.meta["val"]) for n in bodies[name].graph.find_nodes(op="placeholder")]

    weights: dict[int, Tensor] = {}

    def note(name: str, of: Sequence[int], before: int) -> list[Tensor]:
        given = operands(name)
        weights.update(zip(of, given[before:], strict=True))
        return given

    star = "*" if plan.prefill else ""
    inputs = note(f"prologue{star}", plan.prologue, 3)[:3]
    slots: list[Tensor] = []
    for step in plan.steps:
        before = 1 + len(step.sides) + 2
        slots += note(step.target, step.weights, before)[before - 2 : before]
    note("epilogue", plan.epilogue.weights, 1 + len(plan.epilogue.sides))
    where = [torch.zeros(1, dtype=torch.long, device=inputs[0].device)] if plan.prefill else []
    example = [*inputs, *where, *slots, *(weights[i] for i in sorted(weights))]
    varies = {1: "tokens"} if plan.prefill else {}
    dynamic: Dynamic = [varies, varies, *({} for _ in example[2:])]
    with torch.no_grad():
        backend.export(_Whole(plan, bodies), example, dynamic, folder)  # type: ignore[arg-type]

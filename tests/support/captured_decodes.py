"""A stand-in for CUDA graphs, and decodes run one token at a time to compare captured with linked
ones.

Shape legend: B batch, V vocabulary.
"""

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polar_fx.backends import ShapeClass
from polar_fx.compiled import CompiledModel
from polar_fx.program import Program
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.link import LinkedProgram, StepInputs
from tiny_models import prompts

aten = torch.ops.aten
DEPTH = 4
PROGRAMS = ("identity", "skip 1", "skip 0, repeat 2 x3", "repeat 1-2 x2 @0.5")
Run = Callable[..., Tensor]


# ----------------------------------------------------------------------- a stand-in for CUDA graphs


@dataclass
class FakeGraph:
    """Replaying calls the function again: it is bound to the buffers and slots of its capture, as a
    graph is.
    """

    log: list[str]
    number: int
    function: Callable[[], object]

    def replay(self) -> None:
        self.log.append(f"replay {self.number}")
        self.function()

    def reset(self) -> None:
        self.log.append(f"reset {self.number}")


class FakeApi:
    """Notes every call.

    A capture runs nothing, as on CUDA; `fails` says which captures go wrong, half executed.
    """

    def __init__(
        self, fails: Callable[[int], bool] = lambda number: False, keep: bool = True
    ) -> None:
        self.log: list[str] = []
        self.pools: list[Any] = []
        self._numbers, self._fails, self._keep = itertools.count(), fails, keep

    def new_pool(self) -> Any:
        self.log.append("pool")
        return object()

    def capture(self, pool: Any, function: Callable[[], object]) -> FakeGraph:
        number = next(self._numbers)
        self.log.append(f"capture {number}")
        self.pools.append(pool)
        if self._fails(number):
            function()
            try:
                raise RuntimeError(
                    "operation not permitted when stream is capturing\nmore about it"
                )
            finally:
                raise RuntimeError("ending the capture failed, too")
        return FakeGraph(self.log, number, function if self._keep else lambda: None)

    def wait(self) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def count(self, what: str) -> int:
        return sum(entry.startswith(what) for entry in self.log)


class HostWork(TorchDispatchMode):
    """Notes what would copy from the host to a GPU, or wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            aten.lift_fresh.default,
            aten._local_scalar_dense.default,
            aten._to_copy.default,
            aten.nonzero.default,
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def step(
    model: CompiledModel, run: Run, *, program: Program, session: Any, tokens: Tensor
) -> Tensor:
    """Logits [B, V] of one more token a row, as CompiledModel decodes."""
    batch = len(tokens)
    linked = model.linker.link(program, ShapeClass.of(batch, 1, model.pool.length))
    ids, positions = tokens[:, None].to(model.device), session.positions([1] * batch)
    logits = run(linked, StepInputs.of(session, ids, positions=positions))
    session.advance([1] * batch)
    return logits[:, 0]


def steps(
    model: CompiledModel, run: Run, *, program: str | Program, batch: int = 1, num_tokens: int = 4
) -> Generator[Tensor, None, None]:
    """Logits [B, V] of each token of a session, after a ragged prefill."""
    chosen = model.resolve(program)
    with model.runner.open_slots(chosen, batch) as session:
        model.prefill(chosen, session, prompts(*(3 + 2 * i for i in range(batch))))
        for i in range(num_tokens):
            yield step(
                model,
                run,
                program=chosen,
                session=session,
                tokens=(torch.arange(batch) + 7 * i + 3) % 100,
            )


def decode(
    model: CompiledModel, run: Run, *, program: str | Program, batch: int = 1, num_tokens: int = 4
) -> Tensor:
    """Logits [n, B, V] of the tokens of one session."""
    return torch.stack(
        list(steps(model, run, program=program, batch=batch, num_tokens=num_tokens))
    ).cpu()


@dataclass
class Pair:
    """A model whose decodes are captured, and the reference."""

    model: CompiledModel
    plain: CompiledModel
    tolerance: float = 0

    def check(self, graphs: CudaGraphs, program: str | Program, *, batch: int = 1) -> None:
        """A session of captured decodes equals one of linked decodes."""
        got, want = (
            decode(self.model, graphs.run, program=program, batch=batch),
            decode(self.plain, LinkedProgram.run, program=program, batch=batch),
        )
        torch.testing.assert_close(got, want, rtol=0, atol=self.tolerance)

    def use(self, graphs: CudaGraphs, program: str, *, times: int = 1) -> None:
        for _ in range(times):
            decode(self.model, graphs.run, program=program, num_tokens=1)

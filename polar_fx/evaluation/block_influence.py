"""Static removal of the layers that change their input least: block influence (Men et al. 2024,
arXiv 2403.03853).

The influence of a layer is 1 minus the mean, over tokens, of the cosine of its input and its
output. One program for all inputs comes of it. Their search data are text for pretraining; here
they are whatever prompts are given.

Shape legend: B batch, T tokens, d hidden size, D layers.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..backends import ShapeClass
from ..errors import InputError
from ..program import Program
from ..runtime.link import StepInputs

if TYPE_CHECKING:
    from ..compiled import CompiledModel
    from ..runtime.kv_cache import KvSession
    from ..runtime.runner import Runner

_BATCH = 16


def block_influences(model: "CompiledModel", rows: Sequence[Tensor]) -> np.ndarray:
    """Influence of each layer, f64[D] in 0..2, over all tokens of the prompts, rows of ids i64[T].

    The layers run one by one on the model's regions, each once, and each is compared with the one
    before it. Raises InputError if there is no prompt or a state is not finite, and KvOverflowError
    for a prompt that does not fit the model.
    """
    if not rows:
        raise InputError("there are no prompts; give at least one to measure influences on")
    runner, identity = model.runner, Program.identity(model.depth)
    ordered = sorted(rows, key=len)  # batches of like lengths have little padding
    sums, tokens = torch.zeros(model.depth, dtype=torch.float64), 0
    for start in range(0, len(ordered), _BATCH):
        batch = ordered[start : start + _BATCH]
        with runner.open_slots(identity, len(batch)) as session:
            session.require([len(row) for row in batch])
            for ids, counts in runner.chunks(batch):
                sums += _cosine_sums(runner, session, ids=ids, counts=counts)
                tokens += sum(counts)
                session.advance(counts)
    if not bool(sums.isfinite().all()):
        layer = int((~sums.isfinite()).nonzero()[0])
        raise InputError(
            f"the states around layer {layer} are not finite; measure with another dtype or other "
            "prompts"
        )
    return (1 - sums / tokens).clamp_min(0).numpy()


@torch.no_grad()
def _cosine_sums(
    runner: "Runner", session: "KvSession", *, ids: Tensor, counts: list[int]
) -> Tensor:
    """f64[D]: the sum of the cosines of each layer's input and output over the chunk's tokens;
    padding does not count.
    """
    # linked for every token: the last layer's output is needed like any other's, which a prefill
    # would run for one token
    shape = ShapeClass.of(ids.shape[0], ids.shape[1], runner.pool.length)
    linked = runner.linker.link(session.program, shape)
    positions = session.positions(counts, ids.shape[1])
    is_token = torch.arange(ids.shape[1]) < torch.tensor(counts)[:, None]
    found = []
    for before, after in pairwise(linked.states(StepInputs.of(session, ids, positions=positions))):
        # of all streams of a token, in double precision, so that a layer that changes nothing has
        # influence 0
        cosine = torch.nn.functional.cosine_similarity(
            before.flatten(2).cpu().double(), after.flatten(2).cpu().double(), dim=-1
        )
        found.append(cosine[is_token].sum())
    return torch.stack(found)


def least_influence_program(
    influences: np.ndarray,
    num_removed: int,
    *,
    protected: int = 0,
    runs: Callable[[Program], bool] = lambda program: True,
) -> Program:
    """The identity without the `num_removed` layers of lowest influence f64[D]; of equals the
    earlier ones go first.

    The first `protected` layers, those of the trunk, always stay, and so does a layer after them.
    A layer without which the model does not run (`runs`) stays until those that read its keys and
    values are gone. Raises InputError if there are not so many to remove.
    """
    depth = len(influences)
    if influences.ndim != 1 or not np.isfinite(influences).all():
        raise InputError(f"influences are {influences!r}; give a finite number a layer")
    if not 0 <= protected < depth:
        raise InputError(
            f"protected is {protected}; give a number of first layers from 0 to {depth - 1}"
        )
    if not 0 <= num_removed < depth - protected:
        raise InputError(
            f"num_removed is {num_removed}, but of {depth} layers {protected} are protected and "
            f"one more must stay; give 0 to {depth - protected - 1}"
        )
    order = protected + np.argsort(influences[protected:], kind="stable")
    program = Program.identity(depth)
    for _ in range(num_removed):
        # there is always one: the last layer
        program = next(filter(runs, _without_one(program, order.tolist())))
    return program


def _without_one(program: Program, order: Sequence[int]) -> Iterator[Program]:
    """The program without one of its layers, in the order in which they should go."""
    for gone in order:
        if gone in program.path:
            left = [layer for layer in program.path if layer != gone]
            yield Program.from_path(left, program.depth)

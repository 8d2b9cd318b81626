"""Block influence: against hooks on the model, and the programs it gives by hand."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polar_fx
from polar_fx.errors import InputError, KvOverflowError
from polar_fx.evaluation.block_influence import block_influences, least_influence_program
from polar_fx.program import Program
from tiny_search import peaked

DEPTH = 6
IDENTITY = Program.identity(DEPTH)


def parse(text: str) -> Program:
    return Program.parse(text, DEPTH)


def _reference(model: Any, prompts: list[Tensor]) -> np.ndarray:
    """By hooks on the model itself, a prompt at a time."""
    model, found = copy.deepcopy(model).eval(), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, output: found.append((args[0][0].double(), output[0].double()))
        )
    with torch.no_grad():
        for row in prompts:
            model(row[None])
    cosines = [
        (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        for before, after in found
    ]
    return np.array([1 - float(torch.cat(cosines[i::DEPTH]).mean()) for i in range(DEPTH)])


def test_influences_are_those_of_the_model() -> None:
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 40, (n,), generator=generator) for n in (5, 21, 1, 13)]
    model = peaked()
    with torch.no_grad():  # layer 3 returns its input
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    compiled = polar_fx.compile(model, "eager", max_length=47, prefill_chunk=8, cache=False)
    found = block_influences(compiled, prompts)
    assert found[3] == pytest.approx(0, abs=1e-12)
    assert (np.delete(found, 3) > 0.01).all()
    assert found == pytest.approx(_reference(model, prompts), abs=1e-5)
    assert found == pytest.approx(block_influences(compiled, prompts[::-1]), abs=1e-5)
    assert least_influence_program(found, 1, protected=2) == parse("skip 3")
    # taken out, nothing changes
    ids = prompts[1][None]
    assert torch.allclose(compiled.forward(ids, program="skip 3"), compiled.forward(ids), atol=1e-4)
    with pytest.raises(KvOverflowError):
        block_influences(compiled, [torch.zeros(48, dtype=torch.long)])


def test_least_influence_program_by_hand() -> None:
    influences = np.array([0.0, 0.3, 0.1, 0.4, 0.1, 0.2])
    assert least_influence_program(influences, 0) == IDENTITY
    assert least_influence_program(influences, 2) == parse("skip 0, skip 2")
    assert least_influence_program(influences, 1, protected=1) == parse("skip 2")
    assert least_influence_program(influences, 3, protected=1) == parse("skip 2, skip 4-5")
    assert least_influence_program(influences, 2, protected=3) == parse("skip 4-5")
    with pytest.raises(InputError, match="give 0 to 2"):
        least_influence_program(influences, 3, protected=3)


def test_a_layer_stays_until_none_reads_its_keys_and_values() -> None:
    """Layer 3 reads those of layer 1, which has the lowest influence."""

    def runs(program: Program) -> bool:
        return 1 in program.path or 3 not in program.path

    influences = np.array([0.5, 0.1, 0.2, 0.3])
    found = [least_influence_program(influences, n, runs=runs).path for n in (1, 2, 3)]
    assert found == [(0, 1, 3), (0, 1), (0,)]
    assert least_influence_program(influences, 1).path == (0, 2, 3)

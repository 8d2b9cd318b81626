"""Rows of different programs in one batch: the order they meet in, and that each gets what it gets
alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor

from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, KvOverflowError
from polar_fx.passes.address_kv import BLOCK
from polar_fx.program import Program
from polar_fx.runtime.generator import padded_rows
from polar_fx.runtime.lockstep_order import lockstep_calls, shortest_with, union_path
from polar_fx.runtime.lockstep_plan import DECODE
from tiny_models import make

paths = st.lists(st.integers(0, 5), min_size=1, max_size=7).map(tuple)
FAMILIES = ("llama", "gemma3_text", "qwen2_moe", "gpt2")


# ------------------------------------------------------------------------------------------- order


def holds(sequence: Sequence[int], path: Sequence[int]) -> bool:
    rest = iter(sequence)
    return all(layer in rest for layer in path)


def test_the_union_of_a_skip_and_a_repeat_by_hand() -> None:
    assert union_path([(0, 1, 2, 3), (0, 2, 3), (0, 1, 2, 1, 2, 3)]) == (0, 1, 2, 1, 2, 3)


def test_calls_of_equal_geometry_name_one_object() -> None:
    """A pass looks its stores up by identity: to hash a geometry for each layer takes longer."""
    model = compiled("gemma3_text")
    plan = model.runner.lockstep.plans.plan((model.default_program,), DECODE)
    specs = [call.spec for call in plan.calls]
    assert len(set(map(id, specs))) == len(set(specs)) < len(specs)


@given(first=paths, second=paths)
def test_two_paths_are_merged_as_shortly_as_can_be(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    @functools.cache
    def shortest(i: int, j: int) -> int:  # written apart: by cases of the first layer
        if i == len(first) or j == len(second):
            return len(first) - i + len(second) - j
        ways = [1 + shortest(i + 1, j), 1 + shortest(i, j + 1)]
        if first[i] == second[j]:
            ways.append(1 + shortest(i + 1, j + 1))
        return min(ways)

    merged = shortest_with(first, second)
    assert holds(merged, first) and holds(merged, second) and len(merged) == shortest(0, 0)


@given(several=st.lists(paths, min_size=1, max_size=5))
def test_every_row_makes_each_of_its_steps_once_and_in_order(
    several: list[tuple[int, ...]],
) -> None:
    programs = [Program.from_path(path, 6) for path in several]
    made: list[list[int]] = [[] for _ in programs]
    for call in lockstep_calls(programs):
        for row, step in zip(call.rows, call.steps, strict=True):
            assert step == len(made[row])
            made[row].append(call.layer)
    assert [tuple(m) for m in made] == several


# ----------------------------------------------------------------------------- against a row alone


@functools.cache
def compiled(family: str, **options: Any) -> CompiledModel:
    options = {"max_length": 120, "prefill_chunk": 16, "cache": False, **options}
    return compile(make(family), "eager", **options)


def some_programs(depth: int, pick: torch.Generator, *, count: int) -> list[Program]:
    """Skips, repeats, damped and nested ones, and layers in any order."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=pick))

    found = []
    for kind in (number(0, 5) for _ in range(count)):
        start = number(0, depth)
        stop = number(start + 1, depth + 1)
        if kind == 0 and stop - start < depth:
            found.append(Program.parse(f"skip {start}-{stop - 1}", depth))
        elif kind == 1:
            found.append(Program.parse(f"repeat {start}-{stop - 1} x2", depth))
        elif kind == 2:
            found.append(Program.parse(f"repeat {start}-{stop - 1} x3 @0.5", depth))
        elif kind == 3:
            steps = number(1, 2 * depth)
            found.append(Program.from_path([number(0, depth) for _ in range(steps)], depth))
        else:
            found.append(Program.identity(depth))
    return found


def some_rows(pick: torch.Generator, count: int, *, longest: int = 40) -> list[Tensor]:
    lengths = torch.randint(1, longest, (count,), generator=pick).tolist()
    return [torch.randint(1, 90, (n,), generator=pick) for n in lengths]


@torch.no_grad()
def alone(model: CompiledModel, program: Program, *, row: Tensor, tokens: Tensor) -> Tensor:
    """Logits [1 + N, V] after the prompt and after each of `tokens` i64[N], of keys and values in
    slots.
    """
    runner = model.runner
    with runner.open_slots(program, 1) as session:
        logits = [runner.prefill(session, [row])[0]]
        logits += [runner.decode(session, token[None])[0] for token in tokens]
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_each_row_gets_the_logits_it_gets_alone(family: str, seed: int) -> None:
    model, pick = compiled(family), torch.Generator().manual_seed(seed)
    count = 2 + seed
    programs, rows = some_programs(model.depth, pick, count=count), some_rows(pick, count)
    tokens = torch.randint(1, 90, (count, 20), generator=pick)  # past a block and a window
    runner = model.runner
    with runner.open_rows(programs) as session:
        logits = [torch.stack(runner.prefill(session, rows))]
        logits += [runner.decode(session, tokens[:, i]) for i in range(tokens.shape[1])]
    together = torch.stack(logits, 1)
    for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
        torch.testing.assert_close(
            together[i], alone(model, program, row=row, tokens=tokens[i]), atol=1e-4, rtol=1e-4
        )
    assert runner.lockstep.store.num_blocks == 0


@torch.no_grad()
def test_rows_equal_a_plain_loop_over_the_layers_of_the_model() -> None:
    hf: Any = make("llama")
    model = compile(hf, "eager", max_length=64, cache=False)
    programs = [Program.identity(model.depth), model.resolve([0, *range(model.depth)])]
    rows = [torch.arange(3, 12), torch.arange(40, 45)]
    ids, mask = padded_rows([r.tolist() for r in rows])
    together = model.forward(ids, mask, program=programs)
    for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
        hidden = hf.model.embed_tokens(row[None])
        places = torch.arange(len(row))[None]
        turned = hf.model.rotary_emb(hidden, position_ids=places)
        future = torch.full((len(row), len(row)), float("-inf")).triu(1)[None, None]
        for layer in program.path:
            hidden = hf.model.layers[layer](
                hidden, attention_mask=future, position_ids=places, position_embeddings=turned
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        wanted = hf.lm_head(hf.model.norm(hidden))[0]
        torch.testing.assert_close(together[i, -len(row) :], wanted, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_forward_of_random_batches(seed: int) -> None:
    model, pick = compiled("llama"), torch.Generator().manual_seed(seed)
    count = 1 + seed % 6
    programs, rows = (
        some_programs(model.depth, pick, count=count),
        some_rows(pick, count, longest=30),
    )
    ids, mask = padded_rows([r.tolist() for r in rows], side=("left", "right")[seed % 2])
    together = model.forward(ids, mask, program=programs)
    for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
        wanted = model.forward(row[None], program=program)[0]
        torch.testing.assert_close(together[i][mask[i].bool()], wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------- generate


def batch(model: CompiledModel) -> tuple[list[Program], list[Tensor], dict[str, Any]]:
    pick = torch.Generator().manual_seed(3)
    programs, rows = some_programs(model.depth, pick, count=4), some_rows(pick, 4)
    assert len(set(programs)) > 2
    ids, mask = padded_rows([r.tolist() for r in rows])
    return programs, rows, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.0}])
@pytest.mark.parametrize("deterministic", [False, True], ids=["together", "apart"])
def test_generate_gives_each_row_the_tokens_it_gets_alone(
    options: dict[str, Any], deterministic: bool
) -> None:
    model = compiled("llama", deterministic=deterministic)
    programs, rows, prompts = batch(model)
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(**prompts, program=programs, **asked, **options)
    for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
        wanted = model.generate(row[None], program=program, **asked, **options)
        assert together[i, -12:].tolist() == wanted[0, -12:].tolist()


def test_deterministic_rows_have_the_same_bits_as_alone() -> None:
    model = compiled("llama", deterministic=True)
    programs, rows, prompts = batch(model)
    together = model.forward(**prompts, program=programs)
    for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
        assert torch.equal(together[i, -len(row) :], model.forward(row[None], program=program)[0])


def test_scores_and_return_sequences_of_mixed_rows() -> None:
    model = compiled("llama")
    programs, rows, prompts = batch(model)
    asked: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2}
    found = model.generate(
        **prompts, program=programs, **asked, return_dict_in_generate=True, output_logits=True
    )
    assert found.sequences.shape[0] == 2 * len(rows)
    for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
        wanted = model.forward(row[None], program=program)[0, -1]
        for copy in (2 * i, 2 * i + 1):
            torch.testing.assert_close(found.logits[0][copy], wanted, atol=1e-4, rtol=1e-4)


def test_everything_is_given_back_after_an_error() -> None:
    class Failing(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            raise ValueError("of the user's own")

    model = compiled("llama")
    programs, _, prompts = batch(model)
    with pytest.raises(ValueError, match="of the user's own"):
        model.generate(**prompts, program=programs, max_new_tokens=3, logits_processor=[Failing()])
    assert model.runner.lockstep.store.num_blocks == 0


def test_memory_follows_the_tokens_that_are_there() -> None:
    model = compiled("llama", max_length=250)
    programs, rows, _ = batch(model)
    runner = model.runner
    with runner.open_rows(programs) as session:
        runner.prefill(session, rows)
        needed = sum(p.num_steps * -(-len(r) // BLOCK) for p, r in zip(programs, rows, strict=True))
        assert runner.lockstep.store.num_blocks == needed
    before = runner.lockstep.store.num_bytes
    for _ in range(20):
        with runner.open_rows(programs) as session:
            runner.prefill(session, rows)
    assert runner.lockstep.store.num_bytes == before  # what rows gave back is used again


def test_a_nan_stays_in_its_row() -> None:
    """Padding writes what its row computes, such as NaN; no other row may read it, now or later."""
    hf: Any = make("llama")
    model = compile(hf, "eager", max_length=60, cache=False)
    with torch.no_grad():
        hf.model.embed_tokens.weight[7] = float("nan")
    programs = [model.resolve(p) for p in (None, "skip 1", "repeat 1 x2")]
    rows = [torch.arange(10, 30), torch.tensor([7, 7]), torch.arange(10, 13)]
    for _ in range(2):
        with model.runner.open_rows(programs) as session:
            broken = [bool(logits.isnan().all()) for logits in model.runner.prefill(session, rows)]
        assert broken == [False, True, False]


def test_what_is_refused() -> None:
    model = compiled("llama")
    _, rows, prompts = batch(model)
    with pytest.raises(InputError, match="2 programs were given for 4 rows; give one for each"):
        model.generate(**prompts, program=["skip 1", None])
    with (
        pytest.raises(KvOverflowError, match="row 1 needs 121 token positions"),
        model.runner.open_rows(model._of_rows(["skip 1", None], 2)) as session,
    ):
        model.runner.prefill(session, [rows[0], torch.ones(121, dtype=torch.long)])
    assert model.runner.lockstep.store.num_blocks == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text"])
def test_compiled_regions_serve_rows_together(family: str) -> None:
    hf = make(family)
    model = compile(hf, "inductor", max_length=90, cache=False)
    programs = [model.resolve(p) for p in (None, "skip 1", "repeat 0-1 x2 @0.5")]
    rows = [torch.arange(3, 40), torch.arange(7, 9), torch.arange(50, 60)]
    tokens = torch.arange(12).reshape(3, 4)
    reference, runner = compile(hf, "eager", max_length=90, cache=False), model.runner
    with runner.open_rows(programs) as session:
        logits = [torch.stack(runner.prefill(session, rows))]
        logits += [runner.decode(session, tokens[:, i]) for i in range(4)]
    for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
        wanted = alone(reference, program, row=row, tokens=tokens[i])
        torch.testing.assert_close(torch.stack(logits, 1)[i], wanted, atol=1e-4, rtol=1e-4)

"""Prefill runs the last step for the asked-for tokens alone: same logits, same KV, as if every
token had been run.

Shape legend: B batch, T tokens, L KV length, V vocabulary.
"""

import functools

import pytest
import torch
from torch import Tensor

from polar_fx.backends import ShapeClass
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import ProgramError
from polar_fx.program import Program
from polar_fx.runtime.kv_cache import KvSession
from polar_fx.runtime.link import StepInputs
from tiny_models import WINDOW, make, prompts

PROGRAMS = {
    "identity": "identity",
    "skip": "skip 1-2",
    "skip the last layer": "skip 3",
    "repeat": "0 (1-2)*2 3",
    "repeat to the last step": "0-2 (3)*3",
    "damped repeat": "0 (1)*2@0.5 2-3",
    "damped repeat to the last step": "0-1 (2-3)*2@0.5",
    "damped twice to the last step": "0 (1-2 (3)*2@0.5)*2@0.25",
    "damped last step": "0-2 (3)*2@0.5",
    "one step": "2",
    "one layer, damped": "(2)*2@0.25",
    "backwards": "3 2 1 0",
}
HARDEST = "damped twice to the last step"
ROWS = {"longer than the window": (2 * WINDOW,), "ragged": (13, 5, 1)}


@functools.cache
def _compiled(family: str, prefill_chunk: int, *, deterministic: bool = False) -> CompiledModel:
    return compile(
        make(family),
        "eager",
        max_length=31,
        prefill_chunk=prefill_chunk,
        deterministic=deterministic,
        cache=False,
        check=False,
    )


def _agree(compiled: CompiledModel, program: Program, *, rows: list[Tensor]) -> None:
    """Prefill for the last tokens, and for every token, in sessions side by side; then decode in
    both.
    """
    with (
        torch.no_grad(),
        compiled.runner.open_slots(program, len(rows)) as last,
        compiled.runner.open_slots(program, len(rows)) as every,
    ):
        got = compiled.prefill(program, last, rows)
        want = compiled.prefill(program, every, rows, every=True)
        assert list(map(len, want)) == list(map(len, rows))
        torch.testing.assert_close(
            torch.stack(got), torch.stack([w[-1] for w in want]), rtol=0, atol=1e-4
        )
        _same_slots(last, every)
        for token in (7, 11):
            tokens = torch.full((len(rows),), token)
            mine, theirs = (
                compiled.decode(program, last, tokens),
                compiled.decode(program, every, tokens),
            )
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
        _same_slots(last, every)


def _same_slots(one: KvSession, two: KvSession) -> None:
    assert one.lengths == two.lengths and len(one.slots) == len(two.slots) > 0
    for step, (mine, theirs) in enumerate(zip(one.slots, two.slots, strict=True)):
        for got, want in zip(mine, theirs, strict=True):
            for row, length in enumerate(one.lengths):
                assert want[row, :, :length].abs().sum(-1).min() > 0, "every token wrote something"
                torch.testing.assert_close(
                    got[row, :, :length],
                    want[row, :, :length],
                    rtol=0,
                    atol=5e-5,
                    msg=f"step {step}",
                )
                assert not got[row, :, length:-1].any(), (
                    "and nothing wrote behind them, but into the spare column"
                )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_last_tokens_alone_get_what_every_token_gets(name: str, rows: str) -> None:
    _agree(_compiled("gemma2", 512), Program.parse(PROGRAMS[name], 4), rows=prompts(*ROWS[rows]))


@pytest.mark.parametrize("lengths", [(1,), (6, 6), (9, 2)], ids=str)
def test_prompts_of_one_token_and_of_equal_length_get_the_same(lengths: tuple[int, ...]) -> None:
    _agree(_compiled("llama", 512), Program.parse(PROGRAMS[HARDEST], 4), rows=prompts(*lengths))


@pytest.mark.parametrize("chunk", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["skip", "one step", HARDEST])
def test_prompts_in_chunks_get_the_same(name: str, chunk: int) -> None:
    """Rows end in different chunks, on a chunk's edge too; some chunks end no row."""
    _agree(_compiled("gemma2", chunk), Program.parse(PROGRAMS[name], 4), rows=prompts(13, 5, 1, 8))


def test_rows_run_one_by_one_get_the_same() -> None:
    _agree(
        _compiled("llama", 4, deterministic=True),
        Program.parse(PROGRAMS[HARDEST], 4),
        rows=prompts(9, 5),
    )


def test_a_second_prefill_goes_on_where_the_first_ended() -> None:
    compiled, program = _compiled("gemma2", 512), Program.parse(PROGRAMS[HARDEST], 4)
    rows = prompts(13, 7)
    with (
        torch.no_grad(),
        compiled.runner.open_slots(program, 2) as parts,
        compiled.runner.open_slots(program, 2) as whole,
    ):
        compiled.prefill(program, parts, [r[:3] for r in rows])
        got = compiled.prefill(program, parts, [r[3:] for r in rows])
        want = compiled.prefill(program, whole, rows, every=True)
        torch.testing.assert_close(
            torch.stack(got), torch.stack([w[-1] for w in want]), rtol=0, atol=1e-4
        )
        _same_slots(parts, whole)


def test_where_no_row_ends_only_keys_and_values_are_written() -> None:
    compiled, program = _compiled("llama", 512), Program.parse("0 (1-2)*2 3", 4)
    ids = torch.stack(prompts(6, 6))
    linked = compiled.linker.link(program, ShapeClass.of(2, 6, compiled.pool.length), every=False)
    with (
        torch.no_grad(),
        compiled.runner.open_slots(program, 2) as session,
        compiled.runner.open_slots(program, 2) as every,
    ):
        linked.write_kv(StepInputs.of(session, ids, positions=session.positions([6, 6])))
        session.advance([6, 6])
        compiled.prefill(program, every, list(ids), every=True)
        _same_slots(session, every)


def test_any_token_may_be_asked_for() -> None:
    compiled, program = _compiled("gemma2", 512), Program.parse(PROGRAMS[HARDEST], 4)
    ids = torch.stack(prompts(6, 6))
    shape = ShapeClass.of(2, 6, compiled.pool.length)
    with torch.no_grad(), compiled.runner.open_slots(program, 2) as session:
        positions = session.positions([6, 6])
        linked = compiled.linker.link(program, shape)
        want = linked.run(StepInputs.of(session, ids, positions=positions))
    for where in ((0, 5), (3, 3), (5, 1)):
        with torch.no_grad(), compiled.runner.open_slots(program, 2) as session:
            linked = compiled.linker.link(program, shape, every=False)
            positions = session.positions([6, 6])
            got = linked.run(
                StepInputs.of(session, ids, positions=positions, logits_at=torch.tensor(where))
            )
        assert got.shape == (2, 1, 100)
        torch.testing.assert_close(got[:, 0], want[torch.arange(2), list(where)], rtol=0, atol=1e-4)


def test_the_last_step_runs_for_one_token_a_row() -> None:
    """Counted: of a program's layer calls, only the last sees less than the whole prompt."""
    compiled = compile(make("llama"), "eager", max_length=31, cache=False, check=False)
    seen: list[tuple[str, int]] = []
    make_region = compiled.backend.compile_region

    def counting(body, example, dynamic):  # type: ignore[no-untyped-def]
        region = make_region(body, example, dynamic)
        calls_attention = any("scaled_dot_product" in str(n.target) for n in body.graph.nodes)

        def run(operands: list[Tensor]):  # type: ignore[no-untyped-def]
            if operands[0].is_floating_point():
                seen.append(("attention" if calls_attention else "other", operands[0].shape[1]))
            return region(operands)

        return run

    compiled.backend.compile_region = counting  # type: ignore[method-assign]
    program = Program.parse("skip 1", 4)
    with torch.no_grad(), compiled.runner.open_slots(program, 1) as session:
        compiled.prefill(program, session, prompts(9))
    assert seen == [
        ("attention", 9),
        ("attention", 9),
        ("other", 9),
        ("attention", 1),
        ("other", 1),
    ]


def test_a_session_of_another_program_is_refused() -> None:
    compiled = _compiled("llama", 512)
    mine, other = Program.parse("skip 1", 4), Program.identity(4)
    both = f"opened for program {mine}, and program {other} is"
    with torch.no_grad(), compiled.runner.open_slots(mine, 1) as session:
        for call in (
            lambda: compiled.prefill(other, session, prompts(6)),
            lambda: compiled.decode(other, session, torch.tensor([5])),
        ):
            with pytest.raises(ProgramError) as refused:
                call()
            assert str(mine) in str(refused.value) and str(other) in str(refused.value)
        assert session.lengths == [0], "nothing ran"
        for every in (True, False):
            linked = compiled.linker.link(
                other, ShapeClass.of(1, 6, compiled.pool.length), every=every
            )
            ids, positions = torch.stack(prompts(6)), session.positions([6])
            where = None if every else torch.tensor([5])
            with pytest.raises(ProgramError, match=both):
                linked.run(StepInputs.of(session, ids, positions=positions, logits_at=where))
        assert not any(bool(t.any()) for pair in session.slots for t in pair)

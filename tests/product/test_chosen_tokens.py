"""Models whose layers choose the tokens that they attend to, by further keys that they keep: these
keys belong to the step, as keys and values do, and any program is a plain loop over the layers.
"""

from typing import Any

import pytest
import torch
from transformers import Cache

from plain_loop import check_programs, check_rows, lost, plain_logits
from polar_fx.capture.checked import capture_checked
from polar_fx.errors import PolarError
from polar_fx.graph_files.program_file import described_slots
from polar_fx.library import LayerLibrary
from polar_fx.library.symbols import SymbolTable
from polar_fx.program import Program
from slow_cases import some_slow
from tiny_models import CHOOSING, compiled, make, prompts, reference, run_rows, tiny

pytestmark = pytest.mark.skipif(
    not hasattr(Cache, "update_indexer"), reason="caches of this transformers keep no such keys"
)

FAMILY, TOP = "deepseek_v32", 4
ROWS = prompts(14, 9, 5, 1)


def test_the_choice_matters() -> None:
    """Else the tests here would not see a wrong one."""
    few, all_of_them = (reference(make(FAMILY, index_topk=n), ROWS[:1])[0] for n in (TOP, 64))
    torch.testing.assert_close(few[:TOP], all_of_them[:TOP], rtol=0, atol=1e-4)
    assert lost(few[TOP:], all_of_them[TOP:]) > 1e-2


@pytest.mark.parametrize("family", some_slow(CHOOSING, ("axk2",)))
def test_any_program_is_a_plain_loop(family: str) -> None:
    check_programs(family, ROWS, count=3)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_rows_of_several_programs(chunk: int) -> None:
    """In one batch, on blocks."""
    model = compiled(FAMILY)
    assert model.runner.together
    each = [Program.parse(text, 2) for text in ("0-1", "0 (1)*2@0.5 0", "(1 0)*2", "1")]
    check_rows(model, tiny(FAMILY).model, rows=ROWS, each=each, chunk=chunk)


@pytest.mark.slow
def test_compiled_rows() -> None:
    """A row, so that few regions are compiled: a prompt in parts, and decoded tokens."""
    check_rows(
        compiled(FAMILY, "inductor"),
        tiny(FAMILY).model,
        rows=ROWS[:1],
        each=[Program.parse("0 (1)*2@0.5 0", 2)],
        chunk=8,
    )


@pytest.mark.parametrize("where", ["slots", "blocks"])
def test_a_prefill_is_the_prefill_of_one_token_less_and_a_decode(where: str) -> None:
    """By logits, and in slots by what is held: each step has keys of its own."""
    runner, row = compiled(FAMILY).runner, ROWS[0]
    program = Program.from_path([0, 1, 1], runner.depth)
    opened: Any = runner.open_slots if where == "slots" else runner.open
    with opened(program, 1) as whole, opened(program, 1) as cut:
        first = runner.prefill(whole, [row])[0]
        runner.prefill(cut, [row[:-1]])
        second = runner.decode(cut, row[-1:])[0]
        assert lost(first, plain_logits(tiny(FAMILY).model, program, row=row)[-1]) < 2e-4
        assert lost(second, first) < 2e-5
        if where == "blocks":
            return
        for one, other in zip(whole.slots, cut.slots, strict=True):
            assert len(one) == 3
            for a, b in zip(one, other, strict=True):
                assert a[:, :, :14].any() and not a[:, :, 14:].any()
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        once, again = whole.slots[1][2], whole.slots[2][2]  # of the repeated layer
        assert float((once - again).abs().max()) > 0.1
    with opened(program, 1) as session:
        assert not any(bool(part.any()) for slot in session.slots for part in slot)


def test_a_row_goes_on_and_branches() -> None:
    """Conversations: what was cropped or belongs to a branch does not come back by those keys."""
    model = compiled(FAMILY)
    first, other = ROWS[0].tolist(), [7, 8, 9]
    with model.start() as session:
        session.append(first)
        branch = session.branch()
        session.append(other)
        session.crop(len(first) - 4)
        session.append(first[-4:])
        with branch:
            options: Any = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
            found = [list(s.generate(**options)) for s in (session, branch)]
    source: Any = tiny(FAMILY).model
    want = source.generate(ROWS[0][None], pad_token_id=0, **options)[0, len(first) :].tolist()
    assert found == [want, want]


def test_one_graph_holds_for_rows_shorter_and_longer_than_the_choice() -> None:
    """Traced with fewer columns than are chosen."""
    model = make(FAMILY, index_topk=30, num_hidden_layers=1)
    library = LayerLibrary(capture_checked(model))
    for length, rows in ((16, prompts(9, 5)), (64, prompts(50, 41))):
        got = run_rows(
            library, Program.identity(1), rows=rows, prefill=(len(rows[0]) - 3, 4), length=length
        )
        for own, want in zip(got, reference(model, rows), strict=True):
            assert lost(own, want) < 2e-4


def test_the_table_and_files_tell_the_keys() -> None:
    table = tiny(FAMILY).library.table
    again = SymbolTable.from_json(table.to_json())
    assert again == table and again.to_json() == table.to_json()
    spec = again.kv_specs[0]
    assert spec.roles == ("kv",) * 3 and spec.bytes_per_token() == (8 + 4 + 8) * 4
    (described,) = described_slots([spec])
    assert described["more_keys"] == [{"heads": 1, "size": 8}]


def test_layers_that_take_the_choice_of_another_are_refused() -> None:
    model = make("glm_moe_dsa", indexer_types=["full", "shared"])
    with pytest.raises(PolarError, match="layer 0 of 2 hands on 2 values"):
        LayerLibrary(capture_checked(model))

"""Models that ask their cache how many tokens came before, and take it for one number: in a ragged
batch each row has its own.
"""

import functools
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from plain_loop import plain_logits
from polar_fx.capture.checked import capture_checked
from polar_fx.capture.reasons import RowLengthError
from polar_fx.capture.row_values import Past, RowValues
from polar_fx.capture.support import first_position
from polar_fx.library import LayerLibrary
from polar_fx.models import position_limit
from polar_fx.program import Program
from tiny_models import make, prompts, reference, run_rows
from versions import since_transformers

_DECODER = dict(
    d_model=32,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=64,
    is_decoder=True,
    is_encoder_decoder=False,
)
# Whose attention is scaled by how far a token is, four tokens at a time; whose positions are a
# table, from 0 on or after those of padding, a number on, or a range that begins with it; whose
# rotary tables are looked up; whose attention depends on distances.
MODELS: dict[str, dict[str, Any]] = {
    "llama4_text": dict(
        num_hidden_layers=2,
        num_local_experts=2,
        head_dim=8,
        intermediate_size_mlp=64,
        attention_chunk_size=16,
        no_rope_layers=[1, 0],
        floor_scale=4,
        attn_scale=1.0,
    ),
    "bart": _DECODER,
    "mvp": _DECODER,
    "roberta": dict(num_hidden_layers=2, is_decoder=True),
    "inkling_text": dict(
        num_hidden_layers=1,
        layer_types=["full_attention"],
        mlp_layer_types=["dense"],
        head_dim=8,
        d_rel=4,
        rel_extent=6,
        log_scaling_n_floor=4,
        log_scaling_alpha=1.0,
    ),
    "roformer": dict(num_hidden_layers=2, is_decoder=True),
}


@functools.cache
def library(family: str) -> tuple[Any, LayerLibrary]:
    model = make(family, **MODELS[family])
    return model, LayerLibrary(capture_checked(model))


# in former versions these ask their cache for more than keys and values
_CHANGED = ("inkling_text", "roformer")


def _case(family: str) -> Any:
    return pytest.param(family, marks=[since_transformers("5.24")] if family in _CHANGED else [])


@pytest.mark.parametrize("family", [_case(f) for f in MODELS if f in CONFIG_MAPPING])
def test_any_program_is_a_plain_loop(family: str) -> None:
    """Ragged rows in ragged parts, and then token by token."""
    model, own = library(family)
    rows = prompts(14, 9, 5, 1)
    for text in ("0-1", "(1 0)*2@0.5 1") if own.depth > 1 else ("0", "(0)*2@0.5"):
        program = Program.parse(text, own.depth)
        got = run_rows(own, program, rows=rows, prefill=(9, 4, 2, 1))
        for logits, row in zip(got, rows, strict=True):
            want = plain_logits(model, program, row=row)
            assert (logits - want).abs().max() < 2e-4 * want.abs().max()


def test_the_scale_of_attention_matters() -> None:
    """Else the test above would not see a wrong position."""
    row = prompts(14)
    options = {**MODELS["llama4_text"], "attn_scale": 0.0}
    near, far = (
        reference(library("llama4_text")[0], row)[0],
        reference(make("llama4_text", **options), row)[0],
    )
    torch.testing.assert_close(near[:3], far[:3], rtol=0, atol=1e-4)
    assert (near - far)[4:].abs().max() > 1e-2


def test_positions_after_that_of_padding_make_rows_shorter() -> None:
    model, own = library("roberta")
    assert first_position(model) == 1 and position_limit(model) == 255
    rows = prompts(255, 3)
    got = run_rows(own, Program.identity(2), rows=rows, prefill=(250, 3), length=256)
    for logits, want in zip(got, reference(model, rows), strict=True):
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-4)
    assert (first_position(make("opt")), position_limit(make("opt"))) == (0, 256)


# -------------------------------------------------------------------------------- a value by itself


def test_what_code_makes_of_a_length_is_made_for_each_row() -> None:
    positions = torch.tensor([[3, 4], [5, 6], [0, 1]])
    hidden, weight = torch.randn(3, 2, 4), torch.randn(12, 4)

    def computed(past: Any, rows: torch.Tensor) -> torch.Tensor:
        """As model code does it, for one row or several."""
        where = torch.arange(past + 1, past + 3)
        table = torch.nn.functional.embedding(where, weight)
        sin, cos = table[None, :, :].chunk(2, dim=-1)
        scale = torch.log1p(torch.floor((where.float() + 1.0) / 2)).view((1, 2, 1))
        added = (torch.arange(2) + past).unsqueeze(0).expand(len(rows), -1)
        return (
            rows * scale.expand(len(rows), 2, 1)
            + table
            + torch.cat((cos, sin), -1)
            + added[..., None]
        )

    got = computed(Past(positions, None), hidden)
    for row, own, start in zip(got, hidden, (3, 5, 0), strict=True):
        torch.testing.assert_close(row, computed(start, own[None])[0])


def test_a_length_is_no_number() -> None:
    past = Past(torch.tensor([[3, 4], [5, 6]]), 8)
    assert not past + 2 > 8
    for asked in (lambda: past > 5, lambda: past == 0, lambda: bool(past), lambda: past < 4):
        with pytest.raises(RowLengthError):
            asked()
    with pytest.raises(RowLengthError):
        torch.ones(2, past)  # type: ignore[call-overload]
    rows = RowValues(torch.zeros(2, 3, 5))
    assert (rows.dim(), rows.shape, rows.size(0), rows.dtype) == (2, (3, 5), 3, torch.float32)
    assert rows[:, None].shape == (3, 1, 5) and rows.unsqueeze(-1).shape == (3, 5, 1)
    assert rows.view(15).shape == (15,) and rows.expand(2, 4, 3, 5).shape == (2, 4, 3, 5)


def test_values_of_rows_have_no_one_truth_and_no_counted_axes() -> None:
    values: Any = RowValues(torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal((values == 3).value, torch.tensor([[False, False], [True, False]]))
    assert torch.equal((values != 3).value, torch.tensor([[True, True], [False, True]]))
    assert torch.equal(values.sum(-1).value, torch.tensor([3, 7]))
    for wrong in (bool, int, float, lambda v: v.max(), lambda v: v.sum(0), torch.flatten):
        with pytest.raises(RowLengthError):
            wrong(values)


def test_numbers_of_new_tokens_are_counted_from_where_they_begin() -> None:
    past: Any = Past(torch.tensor([[4, 5], [7, 8]]), None)
    assert torch.equal((torch.arange(2) + past).value, past.positions)
    assert torch.equal((torch.arange(1, 3) + past).value, past.positions + 1)
    assert torch.arange(past, past + 2, dtype=torch.float32).value.dtype == torch.float32  # type: ignore[call-overload]

"""Programs compute what a plain loop over the HuggingFace layers computes, and KV changes nothing.

Shape legend: B batch, T tokens, d hidden size, V vocabulary.
"""

import functools
import random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polar_fx.capture.support import last_position
from polar_fx.compiled import CompiledModel, compile
from polar_fx.program import Program
from polar_fx.runtime.generator import padded_rows
from slow_cases import some_slow
from tiny_models import WINDOW, make, prompts, reference

FAMILIES = ("llama", "gemma2", "qwen3")
DEPTH = 4


@functools.cache
def _model(family: str) -> PreTrainedModel:
    return make(family)


@functools.cache
def _compiled(family: str, backend: str = "eager") -> CompiledModel:
    return compile(_model(family), backend, max_length=63, prefill_chunk=7)


# -------------------------------------------------------- the reference: none of our code runs here


@torch.no_grad()
def _plain_loop(
    model: PreTrainedModel,
    path: tuple[int, ...],
    *,
    ids: Tensor,
    blends: tuple[tuple[int, int, float], ...] = (),
) -> Tensor:
    """Logits [T, V]: the model's own modules, called one after the other in the order of `path`,
    without any cache.
    """
    config, inner = model.config, model.model
    hidden = inner.embed_tokens(ids[None])
    tokens = torch.arange(len(ids))
    rotary = inner.rotary_emb(hidden, tokens[None])
    back = tokens[:, None] - tokens[None, :]
    opened: list[Tensor] = []
    for step, layer in enumerate(path):
        opened += [hidden for start, _, _ in blends if start == step]
        sliding = (
            getattr(config, "layer_types", None) is not None
            and config.layer_types[layer] == "sliding_attention"
        )
        seen = (back >= 0) & (back < (config.sliding_window if sliding else len(ids) + 1))
        mask = torch.where(seen, 0.0, torch.finfo(hidden.dtype).min)[None, None]
        result = inner.layers[layer](
            hidden, attention_mask=mask, position_embeddings=rotary, position_ids=tokens[None]
        )
        hidden = result[0] if isinstance(result, tuple) else result
        for _, stop, damping in sorted(blends, key=lambda b: -b[0]):
            if stop == step + 1:
                before = opened.pop()
                hidden = before + damping * (hidden - before)
    logits = model.lm_head(inner.norm(hidden))[0]
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def _random_program(seed: int) -> Program:
    """Skips, block repeats (nested too, damped too) and free paths, one to a dozen steps."""
    pick = random.Random(seed)
    if seed % 4 == 0:
        return Program.from_path(
            tuple(pick.randrange(DEPTH) for _ in range(pick.randint(1, 12))), DEPTH
        )
    program = Program.identity(DEPTH)
    for _ in range(pick.randint(1, 3)):
        start = pick.randrange(program.num_steps)
        length = pick.randint(1, program.num_steps - start)
        if pick.random() < 0.5 and length < program.num_steps:
            if not program.blends:
                program = program.skip(start, length)
        elif program.num_steps <= 12:
            program = _try_repeat(program, start, length=length, pick=pick)
    return program


def _try_repeat(program: Program, start: int, *, length: int, pick: random.Random) -> Program:
    damping = pick.choice([1.0, 1.0, 0.5, 0.25])
    stop = start + length
    crosses = any(
        blend.start < start < blend.stop or blend.start < stop < blend.stop
        for blend in program.blends
    )
    return program if crosses else program.repeat(start, length, pick.randint(2, 3), damping)


def test_the_reference_is_the_model_for_identity() -> None:
    """Trust in the loop itself: on the identity path it equals the model's own forward."""
    for family in FAMILIES:
        ids = prompts(2 * WINDOW)[0]
        with torch.no_grad():
            want = _model(family)(ids[None]).logits[0]
        torch.testing.assert_close(
            _plain_loop(_model(family), tuple(range(DEPTH)), ids=ids), want, rtol=0, atol=5e-5
        )


def test_two_hundred_programs_equal_a_plain_loop_over_the_layers() -> None:
    ids = prompts(2 * WINDOW)[0]
    programs = list(dict.fromkeys(_random_program(seed) for seed in range(400)))[:200]
    assert len(programs) == 200
    assert sum(bool(p.blends) for p in programs) > 20, "damped programs are among them"
    for i, program in enumerate(programs):
        family = FAMILIES[i % len(FAMILIES)]
        got = _compiled(family).forward(ids[None], program=program)[0]
        blends = tuple((b.start, b.stop, b.damping) for b in program.blends)
        want = _plain_loop(_model(family), program.path, ids=ids, blends=blends)
        torch.testing.assert_close(
            got, want, rtol=0, atol=1e-4, msg=lambda m, p=program, f=family: f"{f} {p}: {m}"
        )


def test_linked_programs_equal_the_interpreted_step_graph() -> None:
    """The linker reads a symbol table, the oracle runs the graph that the passes build: same bits
    on eager regions.
    """
    compiled = _compiled("llama")
    ids = torch.stack(prompts(6, 6))  # one chunk
    for seed in range(40):
        program = _random_program(seed)
        with compiled.runner.open_slots(program, 2) as session:
            positions = session.positions([6, 6])
            want = compiled.library.interpret(
                program, ids, positions, compiled.pool.kv_index, session.slots
            )
        with compiled.runner.open_slots(program, 2) as session:
            linked = compiled.prefill(program, session, list(ids), every=True)
        assert torch.equal(torch.stack(linked), want), program


# ------------------------------------------------------------------------------------------- KV law

KV_PROGRAMS = {
    "identity": "identity",
    "skip": "skip 2",
    "skip layer 0": "skip 0",
    "skip the first half": "skip 0-1",
    "repeat": "0 (1)*3 2-3",
    "repeat of a block": "0 (1-2)*2 3",
    "nested repeat": "0 (1 (2)*2)*2 3",
    "damped repeat": "0 (1-2)*3@0.5 3",
    "one layer": "3",
    "backwards": "3 2 1 0",
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", KV_PROGRAMS)
def test_kv_law(name: str, backend: str) -> None:
    """prefill(n) then decode(1) equals prefill(n + 1), for rows of different length in one batch,
    in chunks of 7.
    """
    compiled = _compiled("gemma2", backend)
    program = Program.parse(KV_PROGRAMS[name], DEPTH)
    rows = prompts(15, 4, 9)
    with torch.no_grad(), compiled.session(program, 3) as session:
        compiled.prefill(program, session, [r[:-1] for r in rows])
        got = compiled.decode(program, session, torch.stack([r[-1] for r in rows]))
    for row, mine in zip(rows, got, strict=True):
        with torch.no_grad(), compiled.session(program, 1) as session:
            whole = compiled.prefill(program, session, [row])[0]
        torch.testing.assert_close(mine, whole, rtol=0, atol=5e-5)


def test_decoding_ten_tokens_equals_one_prefill() -> None:
    compiled, program = _compiled("llama"), Program.parse("0 (1-2)*2 3 /4", DEPTH)
    ids = prompts(20)[0]
    whole = compiled.forward(ids[None], program=program)[0]
    with torch.no_grad(), compiled.session(program, 1) as session:
        steps = [compiled.prefill(program, session, [ids[:10]])[0]]
        steps += [compiled.decode(program, session, ids[i : i + 1])[0] for i in range(10, 20)]
    torch.testing.assert_close(torch.stack(steps), whole[9:], rtol=0, atol=5e-5)


# ----------------------------------------------------------------------------- batches and backends


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_rows_alone(side: str) -> None:
    compiled, rows = _compiled("gemma2"), prompts(13, 5, 1)
    ids, mask = torch.zeros(3, 13, dtype=torch.long), torch.zeros(3, 13, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(13 - len(row), 13) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    logits = compiled.forward(ids, mask, program="0 (1-2)*2 3 /4")
    for i, row in enumerate(rows):
        alone = compiled.forward(row[None], program="0 (1-2)*2 3 /4")[0]
        torch.testing.assert_close(logits[i][mask[i].bool()], alone, rtol=0, atol=5e-5)
    assert (logits[~mask.bool()] == 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_inductor_equals_eager(family: str) -> None:
    eager, inductor = _compiled(family), _compiled(family, "inductor")
    one, many = prompts(17)[0][None], torch.stack(prompts(12, 12, 12))
    for seed in range(12):
        program = _random_program(seed)
        for ids in (one, many, one[:, :1]):
            want, got = eager.forward(ids, program=program), inductor.forward(ids, program=program)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_batch_may_be_as_large_as_anything_else_in_the_model() -> None:
    """Three rows and three KV heads, as many rows as tokens: sizes that are equal once are not the
    same size.
    """
    model = make("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    eager, inductor = (
        compile(model, "eager", max_length=63),
        compile(model, "inductor", max_length=63),
    )
    for batch, tokens in ((3, 3), (2, 2), (2, 5), (5, 1), (3, 1), (8, 12)):
        ids = torch.stack(prompts(*[tokens] * batch))
        torch.testing.assert_close(inductor.forward(ids), eager.forward(ids), rtol=0, atol=1e-4)
    assert len(inductor.compilations) == 6, "two shape classes"


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_deterministic_rows_have_the_same_bits_alone_and_in_any_batch(
    backend: str, dtype: torch.dtype
) -> None:
    model = make("llama").to(dtype)
    compiled = compile(model, backend, max_length=63, deterministic=True)
    program = "0 (1-2)*2 3 /4"
    rows = prompts(21, 9, 9, 2)
    want = [_last_and_next(compiled, program, rows=[row])[0] for row in rows]
    for batch in ([0, 1], [3, 2, 1, 0], [1, 1, 1]):
        got = _last_and_next(compiled, program, rows=[rows[i] for i in batch])
        for i, mine in zip(batch, got, strict=True):
            assert torch.equal(mine, want[i])


def _last_and_next(compiled: CompiledModel, text: str, *, rows: list[Tensor]) -> Tensor:
    """[B, 2, V]: logits of each row's last token and of one decoded token."""
    program = compiled.resolve(text)
    with torch.no_grad(), compiled.session(program, len(rows)) as session:
        last = torch.stack(compiled.prefill(program, session, rows))
        return torch.stack(
            [last, compiled.decode(program, session, torch.full((len(rows),), 7))], 1
        )


@pytest.mark.parametrize(
    "family",
    some_slow(("gpt2", "opt", "gptj", "codegen", "biogpt", "gpt_bigcode", "llama")),
)
def test_rows_of_different_length_fit_a_table_of_positions_to_its_last_row(family: str) -> None:
    limits = dict(n_positions=32) if family in ("gpt2", "gptj", "codegen", "gpt_bigcode") else {}
    model = make(family, max_position_embeddings=32, **limits)
    compiled = compile(model, "eager")
    assert compiled.pool.max_length == 32
    rows = prompts(32, 7)
    ids, mask = padded_rows([r.tolist() for r in rows])
    got = compiled.forward(ids, mask)
    for row, logits, want in zip(rows, got, reference(model, rows), strict=True):
        torch.testing.assert_close(logits[32 - len(row) :], want, rtol=1e-3, atol=1e-4)


def test_only_a_model_with_a_table_of_positions_is_told_its_end() -> None:
    found = {
        family: last_position(make(family))
        for family in ("gpt2", "opt", "gptj", "llama", "bloom", "gemma2")
    }
    assert found == {
        "gpt2": 255,
        "opt": 255,
        "gptj": 255,
        "llama": None,
        "bloom": None,
        "gemma2": None,
    }

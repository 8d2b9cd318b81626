"""Layers with a window hold a window: the same tokens, fewer blocks."""

import functools
from dataclasses import replace

import pytest
import torch

from engines import PROGRAMS, compiled, run
from plain_loop import plain_logits
from polar_fx.backends.base import RegionName, ShapeClass
from polar_fx.compiled import CompiledModel, compile
from polar_fx.engine import Sampling
from polar_fx.library.steps import side_values
from polar_fx.passes.address_kv import BLOCK
from polar_fx.runtime.kv_windows import KvWindows
from tiny_models import WINDOW, make

TEXT = [3 + 7 * i % 90 for i in range(200)]


@functools.cache
def long_rows(family: str = "gemma3_text") -> CompiledModel:
    return compile(make(family), "eager", max_length=250, cache=False)


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("gemma3_text", [WINDOW, None, WINDOW]),
        # its masks are added to scores
        pytest.param("gpt_oss", [WINDOW, None] * 2, marks=pytest.mark.slow),
    ],
)
def test_masks_say_how_far_layers_look(family: str, windows: list[int | None]) -> None:
    model = long_rows(family)
    with model.start() as talk:
        talk.append(TEXT[:40])
        talk.append(TEXT[40:41])
    of_layers = model.runner.lockstep.windows
    found: list[int | None] = [None] * model.depth
    for window, steps in of_layers.steps(model.default_program).items():
        for step in steps:
            found[step] = window
    assert found == windows


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_long_row_holds_windows_and_says_the_same(program: str) -> None:
    model, store = long_rows(), long_rows().runner.lockstep.store
    chosen = model.resolve(program)
    with model.start(program) as talk:
        for start, stop in ((0, 60), (60, 61), (61, 150), (150, 199)):
            talk.append(TEXT[start:stop])
        logits = talk.append(TEXT[199:])
        windowed = sum(layer != 1 for layer in chosen.path)
        everything = -(-len(TEXT) // BLOCK)
        few = 4 + -(-WINDOW // BLOCK)  # the last part of 49 tokens, and one to take back
        whole = (chosen.num_steps - windowed) * everything
        assert whole + windowed <= store.num_blocks <= whole + windowed * few
    assert store.num_blocks == 0
    wanted = plain_logits(make("gemma3_text"), chosen, row=torch.tensor(TEXT))[-1]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_tokens_are_taken_back_as_far_as_one_likes() -> None:
    model = long_rows()
    program = model.resolve("repeat 0 x2")
    with model.start("repeat 0 x2") as talk:
        talk.append(TEXT[:150])
        talk.append(TEXT[150:151])
        for length in (148, 40, 39, 0):
            talk.crop(length)
            logits = talk.append(TEXT[length : length + 3])
            row = torch.tensor(TEXT[: length + 3])
            wanted = plain_logits(make("gemma3_text"), program, row=row)[-1]
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert model.runner.lockstep.store.num_blocks == 0


def test_branches_and_turns_of_long_rows_go_on() -> None:
    model = long_rows()
    with model.start() as talk:
        said = talk.generate(TEXT[:100], max_new_tokens=40).tolist()
        with talk.branch() as other:
            new = other.generate(TEXT[100:103], max_new_tokens=5).tolist()
        assert talk.generate(TEXT[100:103], max_new_tokens=5).tolist() == new
    whole = torch.tensor([[*TEXT[:100], *said, *TEXT[100:103]]])
    assert model.generate(whole, max_new_tokens=5)[0, -5:].tolist() == new


def test_what_left_a_window_is_found_where_it_is_not_seen() -> None:
    """A former row serves one that goes on at its end, and one that shares a part of its prompt."""
    model = long_rows()
    engine = model.engine(prefill_tokens=40)
    first = engine.add(TEXT[:120], sampling=Sampling(max_new_tokens=60))
    run(engine)
    said = [*TEXT[:120], *first.result(0).tokens]
    asked = [(said, 176), ([*TEXT[:64], 5], 64), (said[:150], 112)]
    for prompt, found in asked:
        before = engine.stats()["found_tokens"]
        request = engine.add(prompt, sampling=Sampling(max_new_tokens=6))
        run(engine)
        assert engine.stats()["found_tokens"] - before == found
        alone = model.engine(kept_bytes=0)
        other = alone.add(prompt, sampling=Sampling(max_new_tokens=6))
        run(alone)
        assert request.result(0).tokens == other.result(0).tokens
    store = model.runner.lockstep.store
    of_block = store.num_bytes // store.num_allocated
    assert engine.stats()["kept_bytes"] == of_block * store.num_blocks, "rows hold nothing more"
    engine.close()
    assert store.num_blocks == 0


def test_short_programs_leave_nothing_in_what_is_kept() -> None:
    model = compiled()
    engine = model.engine()
    for number in range(1, 4):
        engine.add([5, 6], model.resolve(f"repeat 1 x{number + 1}"), Sampling(max_new_tokens=1))
    run(engine)
    assert engine.stats()["kept_bytes"] == 0
    assert len(engine._rows.kept) == 0  # pyright: ignore[reportPrivateUsage]
    engine.close()


def test_what_other_layers_read_is_held_for_the_one_that_looks_back_furthest() -> None:
    """As if the second layer, which sees everything, and the third, with a window of its own, read
    what the first one writes; or the third alone.
    """
    model = long_rows()
    table, identity = model.library.table, model.default_program
    for owners, held in (({1: 0, 2: 0}, {}), ({2: 0}, {WINDOW: [0]})):
        windows = KvWindows(replace(table, owners=owners))
        windows.look(40, lambda position, width: _sides(model, position, width=width))
        assert windows.steps(identity) == held


def _sides(model: CompiledModel, position: int, *, width: int) -> list[torch.Tensor]:
    ids, start = torch.zeros(1, 1, dtype=torch.long), model.library.prologue
    region = model.regions.one(RegionName(start.target, ShapeClass.of(1, 1, None)))
    inputs = [ids, torch.full_like(ids, position), torch.arange(width)]
    return side_values(region, inputs, weights=start.weights)

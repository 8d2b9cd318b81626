"""Slots that are handed back: a later session meets nothing of this one, and on a GPU little is
launched for it.

Shape legend: B batch.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polar_fx.compiled import CompiledModel, compile
from polar_fx.runtime import kv_cache
from tiny_models import make


class _Fills(TorchDispatchMode):
    """Notes what is filled at once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_zero_.default:
            self.found.append([tuple(t.shape) for t in args[0]])
        assert func is not torch.ops.aten.zero_.default, "one by one"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model() -> CompiledModel:
    return compile(make("llama"), "eager", max_length=31, cache=False)


def _cleared(model: CompiledModel) -> tuple[list[list[tuple[int, ...]]], list[Tensor]]:
    """What a session of two rows that holds NaN fills at its end, and its slots after that."""
    program, rows = model.default_program, [torch.tensor([3, 4, 5]), torch.tensor([6])]
    with model.runner.open_slots(program, 2) as session:
        model.runner.prefill(session, rows)
        parts = [part for slot in session.slots for part in slot]
        for part in parts:
            part[:, :, : session.num_written] = torch.nan
        with _Fills() as seen:
            session.clear()
    return seen.found, parts


def test_what_was_written_is_zero_after_one_fill(model: CompiledModel) -> None:
    found, parts = _cleared(model)
    assert [len(shapes) for shapes in found] == [8], "keys and values of four steps"
    assert all(not part.any() for part in parts)


@pytest.mark.parametrize(("most", "columns"), [(1 << 28, 32), (100, 3)])
def test_a_gpu_fills_small_slots_whole(
    model: CompiledModel, monkeypatch: pytest.MonkeyPatch, most: int, columns: int
) -> None:
    monkeypatch.setattr(kv_cache, "_MOST_FILLED_WHOLE", most)
    with model.runner.open_slots(model.default_program, 2) as session:
        session.will_write(3)
        with _Fills() as seen:
            monkeypatch.setattr(session.pool, "device", SimpleNamespace(type="cuda"))
            session.clear()
            monkeypatch.undo()
    (shapes,) = seen.found
    assert {shape[2] for shape in shapes} == {columns}

"""Greedy continuation without transformers' loop: when it is taken, when it ends, what it asks for.

That it gives the tokens of the model itself is tested in test_generator.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList, TemperatureLogitsWarper

from captured_decodes import FakeApi, HostWork
from polar_fx.compiled import CompiledModel, compile
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.greedy import AHEAD, continued
from tiny_models import make

PAD, END = 0, 9


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return compile(make("llama"), "eager", max_length=63, cache=False)


@pytest.mark.parametrize(
    ("asked", "is_plain"),
    [
        ({}, True),
        ({"eos_token_id": [3, 5]}, True),
        ({"max_length": 20}, True),
        ({"logits_processor": None, "streamer": None}, True),
        ({"do_sample": True}, False),
        ({"num_beams": 2}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_new_tokens": 2}, False),
        ({"max_time": 60.0}, False),
        ({"return_dict_in_generate": True}, False),
        ({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(1.0)])}, False),
        ({"stopping_criteria": StoppingCriteriaList([lambda ids, scores, **kw: True])}, False),
        ({"streamer": object()}, False),
    ],
)
def test_calls_that_ask_for_more_are_left_to_transformers(
    model: CompiledModel, asked: dict[str, Any], is_plain: bool
) -> None:
    length = {} if "max_length" in asked else {"max_new_tokens": 4}
    call = model.generator.check(torch.tensor([[3, 4, 5]]), **length, **asked)
    assert call.is_plain is is_plain


def logits_of(tokens: list[list[int]]) -> Iterator[Tensor]:
    """Logits [B, V] whose largest are these, one list of a row's tokens each."""
    for column in zip(*tokens, strict=True):
        yield torch.nn.functional.one_hot(torch.tensor(column), 12).float()


class _Late:
    """Answers for what it was asked `AHEAD` times ago, as on a GPU."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def all_ended(self, ended: Tensor) -> bool:
        self.asked.append(ended)
        return len(self.asked) > AHEAD and bool(self.asked[-1 - AHEAD].all())


@pytest.mark.parametrize("watch", [None, _Late()])
def test_rows_end_by_themselves_and_all_ends_with_the_last(watch: Any) -> None:
    first, second = [4, END, 5, 5, 5, 5, 5, 5, 5, 5], [7, 7, 7, END, 6, 6, 6, 6, 6, 6]
    rows, calls = logits_of([first, second]), []

    def decode(tokens: Tensor) -> Tensor:
        calls.append(tokens.tolist())
        return next(rows)

    found = continued(next(rows), decode, new=10, ends=[END, 11], pad=PAD, watch=watch)
    assert found.tolist() == [[4, END, PAD, PAD], [7, 7, 7, END]]
    assert calls[:3] == [[4, 7], [END, 7], [PAD, 7]]
    assert len(calls) == 3 + (AHEAD if watch else 0), "little is computed in vain"


def test_without_an_end_there_are_as_many_tokens_as_asked_for() -> None:
    rows = logits_of([[4, END, 5], [7, 7, 7]])
    found = continued(next(rows), lambda tokens: next(rows), new=3, ends=[], pad=PAD)
    assert found.tolist() == [[4, END, 5], [7, 7, 7]]


class _Never:
    def all_ended(self, ended: Tensor) -> bool:
        return False


@pytest.mark.parametrize("ends", [[], [END]])
def test_32_tokens_are_launched_before_the_host_waits(
    model: CompiledModel, ends: list[int]
) -> None:
    model.graphs = CudaGraphs(FakeApi(keep=False))  # replays nothing: what is left is around it
    runner, rows = model.runner, [torch.tensor([3, 4]), torch.tensor([5, 6])]
    with torch.no_grad(), runner.open_slots(model.default_program, 2) as session:
        runner.prefill(session, rows)
        logits = runner.decode(session, torch.tensor([7, 8]))
        with HostWork() as seen:
            found = continued(
                logits,
                lambda tokens: runner.decode(session, tokens),
                new=32,
                ends=ends,
                pad=PAD,
                watch=_Never(),
            )
        assert session.lengths == [2 + 1 + 31] * 2
    model.graphs = None
    waits = [what for what in seen.found if "scalar" in what]
    assert len(waits) == len(ends), "at the end alone: how many tokens are needed"
    assert seen.found.count("aten.lift_fresh.default") == 1, "the ends of a text are copied there"
    assert found.shape[0] == 2 and found.shape[1] <= 32

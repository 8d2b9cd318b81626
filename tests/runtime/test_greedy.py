"""Greedy continuation without transformers' loop: when it is taken, when it ends, what it asks for.

That it gives the tokens of the model itself is tested in test_generator.py.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList, TemperatureLogitsWarper

from captured_decodes import FakeApi, HostWork
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import KvOverflowError
from polar_fx.runtime import greedy
from polar_fx.runtime.cuda_graphs import CudaGraphs
from polar_fx.runtime.greedy import AHEAD, Greedy, continued
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
        ({"eos_token_id": torch.tensor([3, 5])}, True),
        ({"max_length": 20}, False),
        ({"logits_processor": None, "streamer": None}, True),
        ({"do_sample": True}, False),
        ({"num_beams": 2}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_new_tokens": 2}, True),
        ({"min_new_tokens": 2, "eos_token_id": None}, True),
        ({"min_new_tokens": 5}, False),  # of which transformers warns, as of the next one
        ({"min_new_tokens": 2, "min_length": 0}, False),
        ({"min_length": 6}, False),
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
    assert (call.greedy is not None) is is_plain


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

    found = continued(next(rows), decode, asked=Greedy(10, (END, 11), PAD), watch=watch)
    assert found.tolist() == [[4, END, PAD, PAD], [7, 7, 7, END]]
    assert calls[:3] == [[4, 7], [END, 7], [PAD, 7]]
    assert len(calls) == 3 + (AHEAD if watch else 0), "little is computed in vain"


def test_without_an_end_there_are_as_many_tokens_as_asked_for() -> None:
    rows = logits_of([[4, END, 5], [7, 7, 7]])
    found = continued(next(rows), lambda tokens: next(rows), asked=Greedy(3, (), PAD))
    assert found.tolist() == [[4, END, 5], [7, 7, 7]]


@pytest.mark.parametrize("least", [0, 2, 3, 4])
def test_no_row_ends_before_the_least_number_of_tokens(least: int) -> None:
    rows = iter(torch.rand(8, 2, 12) + 9 * torch.eye(12)[END])
    found = continued(next(rows), lambda tokens: next(rows), asked=Greedy(4, (END, 99), PAD, least))
    assert found.shape == (2, min(least + 1, 4))
    assert (found[:, :least] != END).all() and (found[:, least:] == END).all()


@pytest.mark.parametrize("least", [1, 3, 6])
def test_the_least_number_of_tokens_is_that_of_the_model(least: int) -> None:
    hf, ids = make("llama"), torch.tensor([[3, 4, 5], [6, 7, 8]])
    compiled = compile(hf, "eager", max_length=63, cache=False)
    free = hf.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    settings: dict[str, Any] = dict(
        max_new_tokens=6,
        min_new_tokens=least,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=free[:, 3].tolist(),  # the first tokens end the rows, unless others must come
    )
    want = hf.generate(ids, **settings)
    assert want.shape[1] >= 3 + least
    call = compiled.generator.check(ids, **settings)
    assert call.greedy is not None and call.greedy.least == least
    assert torch.equal(compiled.generate(ids, **settings), want)


class _Never:
    def all_ended(self, ended: Tensor) -> bool:
        return False


@pytest.mark.parametrize(("ends", "least"), [((), 0), ((END,), 0), ((END,), 2)])
def test_32_tokens_are_launched_before_the_host_waits(
    model: CompiledModel, ends: tuple[int, ...], least: int
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
                asked=Greedy(32, ends, PAD, least),
                watch=_Never(),
            )
        assert session.lengths == [2 + 1 + 31] * 2
    model.graphs = None
    waits = [what for what in seen.found if "scalar" in what]
    assert len(waits) == len(ends), "at the end alone: how many tokens are needed"
    assert seen.found.count("aten.lift_fresh.default") == 1, "the ends of a text are copied there"
    assert found.shape[0] == 2 and found.shape[1] <= 32


@pytest.mark.parametrize("length", [5, 19, 20, 45])
def test_without_a_length_there_are_as_many_tokens_as_from_the_model(length: int) -> None:
    hf, ids = make("llama"), torch.arange(3, 3 + length)[None]
    compiled = compile(hf, "eager", max_length=63, cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the default length
        want = hf.generate(ids, do_sample=False, pad_token_id=0)
        if length + 20 - 1 <= compiled.runner.max_length:
            assert torch.equal(compiled.generate(ids, do_sample=False, pad_token_id=0), want)
        else:
            with pytest.raises(KvOverflowError):
                compiled.generate(ids, do_sample=False)


def test_a_conversation_holds_what_was_said_although_the_loop_went_on(
    model: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "_AtOnce", _Late)
    ids = torch.tensor([[3, 4, 5]])
    end = int(model.generate(ids, max_new_tokens=2, eos_token_id=None)[0, -1])
    with model.start() as late, model.start() as fresh:
        said = late.generate([3, 4, 5], max_new_tokens=20, eos_token_id=end, pad_token_id=0)
        assert len(said) <= 2
        got = late.append([7, 8, 9])
        want = fresh.append([3, 4, 5, *said.tolist(), 7, 8, 9])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

"""lm-eval on a compiled model: likelihoods and generations are the model's own, by the program
chosen for each context.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from harness_samples import DEPTH, LENGTH, PROGRAMS, programs_run, requests_of, scores_of, texts_of
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration
from polar_fx.program import Program
from polar_fx.runtime.trunk import run_trunk

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'polar_fx[harness]'")

from lm_eval.api.model import CachingLM  # pyright: ignore[reportMissingImports]

from polar_fx.lm_harness import PolarLM

# lm-eval's and datasets' own are not ours to fail on
pytestmark = pytest.mark.filterwarnings("default")


class ByFirstToken:
    """Proposes the program whose number is the first token, modulo their count; sees it in the
    embedding's hidden state.
    """

    depth = DEPTH
    calibration = Calibration(threshold=0.5)

    def __init__(self, model: Any) -> None:
        self.features, self.menu, self.seen = Features(2, 64), Menu.of(PROGRAMS), 0
        rows = [torch.tensor([t]) for t in range(model.vocab_size)]
        with run_trunk(model.runner, rows, num_steps=2) as trunk:
            self.table = torch.stack([h[0] for h in trunk.hidden])

    def propose(self, hidden: Any) -> list[Proposal]:
        self.seen += len(hidden)
        tokens = [int((self.table - row[0]).norm(dim=1).argmin()) for row in hidden]
        chances = np.eye(len(self.menu))
        return [
            Proposal(self.menu.programs, self.menu.steps, chances[t % len(self.menu)])
            for t in tokens
        ]

    def of(self, token: int) -> Program:
        return self.menu.programs[token % len(self.menu)]


@pytest.fixture(scope="module")
def said(reference: Any, tokenizer: Any) -> tuple[str, str]:
    """A prompt of two letters, and the six characters, at least two different ones, that greedy
    decoding goes on with.
    """
    prompts = [a + b for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
    ids = torch.tensor([tokenizer.encode(p) for p in prompts])
    tokens = reference.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, 2:]
    texts = tokenizer.batch_decode(tokens)
    return next(
        (p, t)
        for p, t in zip(prompts, texts, strict=True)
        if t.isascii() and len(t) == 6 and t[2:4] not in t[:3]
    )


@torch.no_grad()
def _plain(
    forward: Callable[[Tensor], Tensor], context: list[int], *, continuation: list[int]
) -> tuple[float, bool]:
    """What one plain pass of `forward`, token ids -> logits, says of a continuation."""
    logits = forward(torch.tensor([context + continuation[:-1]]))[0, -len(continuation) :]
    target = torch.tensor(continuation)
    return float(logits.log_softmax(-1).gather(1, target[:, None]).sum()), bool(
        (logits.argmax(-1) == target).all()
    )


PAIRS = [
    ("2+2", "=4"),
    ("1+1=", "2"),
    ("1+1=", "3"),
    ("1+1=", "23"),
    ("ends in a space ", "word"),
    ("", "no context"),
    ("longer by far than others are: 1 2 3 4 5 6", " 7"),
    ("    ", "x"),
    ("5*5", "=25\n"),
]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_the_models_own(
    compiled: Any, tokenizer: Any, reference: Any, said: Any, batch_size: int
) -> None:
    lm = PolarLM(compiled, tokenizer, batch_size=batch_size)
    pairs = [*PAIRS, said]
    got = scores_of(lm, pairs)
    for (context, continuation), (value, is_greedy) in zip(pairs, got, strict=True):
        bare = context.rstrip()  # white space at the end goes to the continuation
        behind = tokenizer.encode(context[len(bare) :] + continuation)
        wanted = _plain(
            lambda ids: reference(ids).logits,
            tokenizer.encode(bare) or [tokenizer.eos_token_id],
            continuation=behind,
        )
        assert value == pytest.approx(wanted[0], abs=1e-4) and is_greedy == wanted[1], (
            context,
            continuation,
        )
    assert got[-1][1] and not all(is_greedy for _, is_greedy in got)


def test_the_same_numbers_as_the_harness_own_model(
    compiled: Any, tokenizer: Any, reference: Any
) -> None:
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    theirs: Any = HFLM(
        pretrained=reference, tokenizer=tokenizer, max_length=LENGTH, batch_size=2, device="cpu"
    )
    ours = PolarLM(compiled, tokenizer, batch_size=2)
    # cut, and as long as can be
    pairs = [p for p in PAIRS if p[0].strip()] + [("a" * 70, "bc"), ("b", "c" * LENGTH)]
    for got, wanted in zip(scores_of(ours, pairs), scores_of(theirs, pairs), strict=True):
        assert got[0] == pytest.approx(wanted[0], abs=1e-4, rel=1e-5) and got[1] == wanted[1]
    texts = [("short",), ("a text of more than one window, " * 5,), ("x" * (LENGTH + 1),)]
    wanted = theirs.loglikelihood_rolling(
        requests_of("loglikelihood_rolling", texts), disable_tqdm=True
    )
    got = ours.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(wanted, abs=1e-3, rel=1e-5)
    assert ours.report()["tasks"]["t"]["questions"] == max(len(pairs), len(texts))
    asked = [
        (f"{i}+{i}=", {"until": [stop], "max_gen_toks": 9})
        for i in range(5)
        for stop in ("\n", "e", "never said")
    ]
    assert texts_of(ours, asked) == texts_of(
        theirs, [(c, dict(a, until=list(a["until"]))) for c, a in asked]
    )


def test_programs_are_chosen_by_contexts_alone(compiled: Any, tokenizer: Any) -> None:
    compiled.dispatch_by(predictor := ByFirstToken(compiled))
    lm = PolarLM(compiled, tokenizer, batch_size=4)
    contexts = ["a+1=", "b+11=", "c+1", "d+2222222222", "a+1=", "e+1"]
    pairs = [(context, answer) for context in contexts for answer in ("1", "2", "12\n")]
    got = scores_of(lm, pairs)
    assert predictor.seen == len(set(contexts))
    programs = [predictor.of(tokenizer.encode(context)[0]) for context, _ in pairs]
    assert len(set(programs)) == 4
    for (context, answer), program, (value, is_greedy) in zip(pairs, programs, got, strict=True):
        wanted = _plain(
            partial(compiled.forward, program=program),
            tokenizer.encode(context),
            continuation=tokenizer.encode(answer),
        )
        assert value == pytest.approx(wanted[0], abs=1e-4) and is_greedy == wanted[1]
    found = lm.report()["tasks"]["t"]
    assert found["requests"] == found["questions"] == len(pairs) and found["instead"] == {}
    assert programs_run(lm) == {str(p): programs.count(p) for p in programs}
    assert found["mean_steps"] == pytest.approx(np.mean([p.num_steps for p in programs]))


def test_steps_are_a_mean_over_questions(compiled: Any, tokenizer: Any) -> None:
    compiled.dispatch_by(predictor := ByFirstToken(compiled))
    lm = PolarLM(compiled, tokenizer)
    letter_of = {predictor.of(tokenizer.encode(c)[0]): c for c in "abcd"}
    skips, repeats = letter_of[PROGRAMS[0]], letter_of[PROGRAMS[1]]
    requests = requests_of(
        "loglikelihood", [(skips, "1"), (repeats, "1"), (repeats, "2"), (repeats, "3")]
    )
    for request in requests[1:]:
        request.doc_id = 1
    lm.loglikelihood(requests, disable_tqdm=True)
    found = lm.report()["tasks"]["t"]
    # of 5 and 7 steps
    assert (found["questions"], found["requests"], found["mean_steps"]) == (2, 4, 6.0)


def test_generation_is_generates_by_the_program_of_each_row(compiled: Any, tokenizer: Any) -> None:
    compiled.dispatch_by(predictor := ByFirstToken(compiled))
    lm = PolarLM(compiled, tokenizer, batch_size=4)
    asked = [
        (f"{letter}{'+1' * n}=", {"max_gen_toks": 4 + n % 2, "until": []})
        for n, letter in enumerate("abcdabce")
    ]
    got = texts_of(lm, asked)
    for (context, arguments), text in zip(asked, got, strict=True):
        ids = torch.tensor([tokenizer.encode(context)])
        options: dict[str, Any] = dict(
            max_new_tokens=arguments["max_gen_toks"], do_sample=False, pad_token_id=0
        )
        tokens = compiled.generate(ids, program=predictor.of(int(ids[0, 0])), **options)
        assert text == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(lm.report()["tasks"]["t"]["programs"]) == 4


def test_a_named_program_runs_in_place_of_the_dispatcher(compiled: Any, tokenizer: Any) -> None:
    compiled.dispatch_by(predictor := ByFirstToken(compiled))
    lm = PolarLM(compiled, tokenizer, program="skip 2-3")
    wanted, _ = _plain(
        partial(compiled.forward, program="skip 2-3"),
        tokenizer.encode("a"),
        continuation=tokenizer.encode("b"),
    )
    assert scores_of(lm, [("a", "b")])[0][0] == pytest.approx(wanted, abs=1e-4)
    assert (
        predictor.seen == 0
        and lm.report()["policy"] is None
        and programs_run(lm) == {str(Program.parse("skip 2-3", DEPTH)): 1}
    )


@pytest.fixture
def calls(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], int]]:
    """The arguments of each call of `generate`, and how many tokens it made."""
    seen, generate = [], compiled.generate

    def recorded(ids: Tensor, **kwargs: Any) -> Tensor:
        tokens = generate(ids, **kwargs)
        seen.append((kwargs, tokens.shape[1] - ids.shape[1]))
        return tokens

    monkeypatch.setattr(compiled, "generate", recorded)
    return seen


def test_stop_strings_are_looked_for_in_the_new_text(
    compiled: Any, tokenizer: Any, said: Any, calls: Any
) -> None:
    prompt, text = said
    over = prompt[1] + text[0]
    until = (text[2:4], [text[2:4], "never"], [over], [text[0]], None)
    got = texts_of(
        PolarLM(compiled, tokenizer, batch_size=3),
        [(prompt, {"max_gen_toks": 6, "until": u}) for u in until],
    )
    assert got == [text[:2], text[:2], text.partition(over)[0], "", text]
    # it ends where the string does, and the prompt's end is no part of one
    assert [new for _, new in calls] == [4, 4, 6, 1, 6]


def test_special_tokens_end_a_generation_and_are_not_in_its_text(
    folder: Path, compiled: Any, said: tuple[str, str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, text = said
    tokenizer.add_special_tokens({"additional_special_tokens": [text[3]]})
    asked = [(prompt, {"max_gen_toks": 6, "until": [text[3]]})]
    assert texts_of(PolarLM(compiled, tokenizer), asked) == [text.partition(text[3])[0]]


def test_sampling_arguments_go_through(compiled: Any, tokenizer: Any, calls: Any) -> None:
    lm, greedy = PolarLM(compiled, tokenizer), {"do_sample": False}
    for given, wanted in [
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, greedy),
        ({"temperature": 0.0}, greedy),
        ({}, greedy),
    ]:
        texts_of(lm, [("1+1=", {"max_tokens": 2, **given})])
        kwargs, new = calls.pop()
        assert {
            n: kwargs[n] for n in ("do_sample", "temperature", "top_p", "top_k") if n in kwargs
        } == wanted and new <= 2


def test_choices_of_one_token_share_a_pass(
    compiled: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    prefill = compiled.runner.prefill
    monkeypatch.setattr(
        compiled.runner,
        "prefill",
        lambda *args, **kwargs: rows.append(len(args[1])) or prefill(*args, **kwargs),
    )
    scores_of(PolarLM(compiled, tokenizer, batch_size=8), [("which?", c) for c in (*"ABCD", "AB")])
    assert sum(rows) == 2


def test_the_response_cache_is_filled(compiled: Any, tokenizer: Any, tmp_path: Path) -> None:
    lm = PolarLM(compiled, tokenizer)
    cached: Any = CachingLM(lm, str(tmp_path / "responses.db"))
    requests = requests_of("loglikelihood", [("a", "b"), ("a", "c")])
    first = cached.loglikelihood(requests)
    assert cached.loglikelihood(requests) == first
    assert lm.report()["tasks"]["t"]["requests"] == 2
    cached.dbdict.close()

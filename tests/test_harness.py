"""lm-eval on a compiled model: likelihoods and generations are the model's own, by the program
chosen for each context.
"""

import json
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import polar_fx
from polar_fx.errors import InputError
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration, Policy
from polar_fx.predictor.saved import save_selector
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.program import Program
from polar_fx.questions import DIRECT
from polar_fx.runtime.trunk import run_trunk
from tiny_search import save_tiny

lm_eval: Any = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed; pip install 'polar_fx[harness]'"
)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from polar_fx.lm_harness import PolarLM, local_task  # noqa: E402

# lm-eval's and datasets' own are not ours to fail on
pytestmark = pytest.mark.filterwarnings("default")

DEPTH, LENGTH = 6, 63
PROGRAMS = [Program.parse(text, DEPTH) for text in ("skip 3", "repeat 4", "0-1 (2-3)*2@0.5 4-5")]


class ByFirstToken:
    """Proposes the program whose number is the first token, modulo their count; sees it in the
    embedding's hidden state.
    """

    depth = DEPTH
    calibration = Calibration(threshold=0.5)

    def __init__(self, model: Any) -> None:
        self.features, self.menu, self.seen = Features(2, 64), Menu.of(PROGRAMS), 0
        rows = [torch.tensor([t]) for t in range(model.vocab_size)]
        with run_trunk(model.runner, rows, 2) as trunk:
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


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


@pytest.fixture(scope="module")
def made(folder: Path) -> Any:
    return polar_fx.compile(folder, "eager", max_length=LENGTH, prefill_chunk=16, cache=False)


@pytest.fixture
def compiled(made: Any) -> Any:
    made.dispatcher = None
    return made


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, as an isolated machine has none."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was asked for {args}")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def _requests(kind: str, arguments: list[tuple[Any, ...]], task: str = "t") -> list[Any]:
    return [Instance(kind, {}, args, 0, (task, i, 1)) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


def _scores(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)


def _texts(lm: Any, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return lm.generate_until(_requests("generate_until", asked), disable_tqdm=True)


def _ran(lm: Any) -> dict[str, int]:
    return {row["program"]: row["requests"] for row in lm.report()["tasks"]["t"]["programs"]}


def _evaluate(lm: Any, *tasks: dict[str, Any], **options: Any) -> Any:
    """The results of tasks; lm-eval's own are not looked through."""
    options |= {
        "bootstrap_iters": 0,
        "task_manager": TaskManager(include_defaults=False),
        "log_samples": True,
    }
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), **options)


@torch.no_grad()
def _plain(
    forward: Callable[[Tensor], Tensor], context: list[int], continuation: list[int]
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
    got = _scores(lm, pairs)
    for (context, continuation), (value, is_greedy) in zip(pairs, got, strict=True):
        bare = context.rstrip()  # white space at the end goes to the continuation
        behind = tokenizer.encode(context[len(bare) :] + continuation)
        wanted = _plain(
            lambda ids: reference(ids).logits,
            tokenizer.encode(bare) or [tokenizer.eos_token_id],
            behind,
        )
        assert value == pytest.approx(wanted[0], abs=1e-4) and is_greedy == wanted[1], (
            context,
            continuation,
        )
    assert got[-1][1] and not all(is_greedy for _, is_greedy in got)


def test_the_same_numbers_as_the_harness_own_model(
    compiled: Any, tokenizer: Any, reference: Any
) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs: Any = HFLM(
        pretrained=reference, tokenizer=tokenizer, max_length=LENGTH, batch_size=2, device="cpu"
    )
    ours = PolarLM(compiled, tokenizer, batch_size=2)
    # cut, and as long as can be
    pairs = [p for p in PAIRS if p[0].strip()] + [("a" * 70, "bc"), ("b", "c" * LENGTH)]
    for got, wanted in zip(_scores(ours, pairs), _scores(theirs, pairs), strict=True):
        assert got[0] == pytest.approx(wanted[0], abs=1e-4, rel=1e-5) and got[1] == wanted[1]
    texts = [("short",), ("a text of more than one window, " * 5,), ("x" * (LENGTH + 1),)]
    wanted = theirs.loglikelihood_rolling(
        _requests("loglikelihood_rolling", texts), disable_tqdm=True
    )
    got = ours.loglikelihood_rolling(_requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(wanted, abs=1e-3, rel=1e-5)
    assert ours.report()["tasks"]["t"]["questions"] == max(len(pairs), len(texts))
    asked = [
        (f"{i}+{i}=", {"until": [stop], "max_gen_toks": 9})
        for i in range(5)
        for stop in ("\n", "e", "never said")
    ]
    assert _texts(ours, asked) == _texts(
        theirs, [(c, dict(a, until=list(a["until"]))) for c, a in asked]
    )


def test_programs_are_chosen_by_contexts_alone(compiled: Any, tokenizer: Any) -> None:
    compiled.dispatch_by(predictor := ByFirstToken(compiled))
    lm = PolarLM(compiled, tokenizer, batch_size=4)
    contexts = ["a+1=", "b+11=", "c+1", "d+2222222222", "a+1=", "e+1"]
    pairs = [(context, answer) for context in contexts for answer in ("1", "2", "12\n")]
    got = _scores(lm, pairs)
    assert predictor.seen == len(set(contexts))
    programs = [predictor.of(tokenizer.encode(context)[0]) for context, _ in pairs]
    assert len(set(programs)) == 4
    for (context, answer), program, (value, is_greedy) in zip(pairs, programs, got, strict=True):
        wanted = _plain(
            partial(compiled.forward, program=program),
            tokenizer.encode(context),
            tokenizer.encode(answer),
        )
        assert value == pytest.approx(wanted[0], abs=1e-4) and is_greedy == wanted[1]
    found = lm.report()["tasks"]["t"]
    assert found["requests"] == found["questions"] == len(pairs) and found["instead"] == {}
    assert _ran(lm) == {str(p): programs.count(p) for p in programs}
    assert found["mean_steps"] == pytest.approx(np.mean([p.num_steps for p in programs]))


def test_steps_are_a_mean_over_questions(compiled: Any, tokenizer: Any) -> None:
    compiled.dispatch_by(predictor := ByFirstToken(compiled))
    lm = PolarLM(compiled, tokenizer)
    skips, repeats = (
        next(c for c in "abcd" if predictor.of(tokenizer.encode(c)[0]) == p) for p in PROGRAMS[:2]
    )
    requests = _requests(
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
    got = _texts(lm, asked)
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
        partial(compiled.forward, program="skip 2-3"), tokenizer.encode("a"), tokenizer.encode("b")
    )
    assert _scores(lm, [("a", "b")])[0][0] == pytest.approx(wanted, abs=1e-4)
    assert (
        predictor.seen == 0
        and lm.report()["policy"] is None
        and _ran(lm) == {str(Program.parse("skip 2-3", DEPTH)): 1}
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
    got = _texts(
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
    assert _texts(PolarLM(compiled, tokenizer), asked) == [text.partition(text[3])[0]]


def test_sampling_arguments_go_through(compiled: Any, tokenizer: Any, calls: Any) -> None:
    lm, greedy = PolarLM(compiled, tokenizer), {"do_sample": False}
    for given, wanted in [
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, greedy),
        ({"temperature": 0.0}, greedy),
        ({}, greedy),
    ]:
        _texts(lm, [("1+1=", {"max_tokens": 2, **given})])
        kwargs, new = calls.pop()
        assert {
            n: kwargs[n] for n in ("do_sample", "temperature", "top_p", "top_k") if n in kwargs
        } == wanted and new <= 2


def test_choices_of_one_token_share_a_pass(
    compiled: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    prefill = compiled.prefill
    monkeypatch.setattr(
        compiled,
        "prefill",
        lambda *args, **kwargs: rows.append(len(args[2])) or prefill(*args, **kwargs),
    )
    _scores(PolarLM(compiled, tokenizer, batch_size=8), [("which?", c) for c in (*"ABCD", "AB")])
    assert sum(rows) == 2


def test_a_task_of_local_questions(
    folder: Path, tokenizer: Any, offline: None, tmp_path: Path
) -> None:
    arguments = {
        "pretrained": str(folder),
        "backend": "eager",
        "max_length": 128,
        "policy": "skip 3",
        "batch_size": 4,
    }
    tasks = [
        local_task("addition", tmp_path, 10, kind=kind)
        for kind in ("generate_until", "loglikelihood")
    ]
    found = _evaluate("polar_fx", *tasks, model_args=arguments)
    names = [task["task"] for task in tasks]
    assert (
        "exact_match,none" in found["results"][names[0]]
        and "acc,none" in found["results"][names[1]]
    )
    report = found["config"]["polar_fx"]
    assert (
        report["policy"] == str(Program.parse("skip 3", DEPTH))
        and json.loads(json.dumps(report)) == report
    )
    for name in names:
        assert (
            report["tasks"][name]["mean_steps"] == DEPTH - 1
            and report["tasks"][name]["questions"] == 10
        )
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        asked = json.dumps(found["samples"][name][0]["arguments"])
        assert all(
            json.dumps(rows[0][part]) in asked
            for part in ("prompt", "target")[: 1 + (name == names[1])]
        )


def test_the_command_line_finds_a_task(
    folder: Path, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.__main__ import cli_evaluate

    name = local_task("addition", tmp_path / "tasks", 3, kind="loglikelihood")["task"]
    arguments = f"pretrained={folder},backend=eager,max_length=128,program=skip 3"
    monkeypatch.setattr(
        "sys.argv",
        [
            "lm-eval",
            "--model",
            "polar_fx",
            "--model_args",
            arguments,
            "--include_path",
            str(tmp_path / "tasks"),
            "--tasks",
            name,
            "--output_path",
            str(tmp_path / "out.json"),
        ],
    )
    cli_evaluate()
    (written,) = tmp_path.rglob("out*.json")
    found = json.loads(written.read_text())
    assert (
        found["config"]["polar_fx"]["tasks"][name]["mean_steps"] == DEPTH - 1
        and "acc,none" in found["results"][name]
    )


def test_the_task_scores_right_answers_right(
    tokenizer: Any, compiled: Any, offline: None, tmp_path: Path
) -> None:
    task = local_task("addition", tmp_path, 6)
    rows = {
        r["prompt"]: r["answer"]
        for r in map(json.loads, (tmp_path / f"{task['task']}.jsonl").read_text().splitlines())
    }
    wrong = next(iter(rows))

    class Knowing(PolarLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [f" {rows[r.args[0]]}" if r.args[0] != wrong else " 0" for r in requests]

    found = _evaluate(Knowing(compiled, tokenizer), task)
    assert found["results"][task["task"]]["exact_match,none"] == pytest.approx(5 / 6)


def test_chat_templates_are_the_tokenizers(
    folder: Path, compiled: Any, offline: None, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last "
        "%}|{% endif %}{% endfor %}{% if add_generation_prompt %}|[assistant]{% endif %}"
    )
    tokenizer.bos_token = "</s>"
    lm = PolarLM(compiled, tokenizer)
    turns = [{"role": "user", "content": "hi"}]
    assert (
        "/" not in lm.tokenizer_name and lm.apply_chat_template(turns) == "</s>[user]hi|[assistant]"
    )
    assert lm.apply_chat_template(
        [*turns, {"role": "assistant", "content": "A"}], add_generation_prompt=False
    ).endswith("]A")
    assert lm.tok_encode("</s>[user]hi") == tokenizer.encode(
        "</s>[user]hi", add_special_tokens=False
    )
    found = _evaluate(lm, local_task("addition", tmp_path, 2), apply_chat_template=True)
    assert "[user]" in json.dumps(
        found["samples"]["polar_fx_addition_generate_until"][0]["arguments"]
    )


def test_the_response_cache_is_filled(compiled: Any, tokenizer: Any, tmp_path: Path) -> None:
    lm = PolarLM(compiled, tokenizer)
    cached: Any = CachingLM(lm, str(tmp_path / "responses.db"))
    requests = _requests("loglikelihood", [("a", "b"), ("a", "c")])
    first = cached.loglikelihood(requests)
    assert cached.loglikelihood(requests) == first
    assert lm.report()["tasks"]["t"]["requests"] == 2
    cached.dbdict.close()


def test_options_from_arguments(folder: Path) -> None:
    text = (
        f"pretrained={folder},backend=eager,dtype=bfloat16,max_length=48,policy=skip "
        "3,max_gen_toks=7"
    )
    lm = get_model("polar_fx").create_from_arg_string(
        text, {"batch_size": "2", "device": "cpu", "max_batch_size": None}
    )
    assert (lm.max_length, lm.max_gen_toks, lm.batch_size, lm.device.type) == (48, 7, 2, "cpu")
    assert (
        lm.compiled.dtype == torch.bfloat16
        and Program.parse("skip 3", DEPTH) in lm.compiled.dispatcher.prepared
    )
    assert get_model("hf").__name__ == "HFLM"  # others are known beside it


def test_a_saved_predictor_and_policy_from_arguments(
    folder: Path, made: Any, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    selector = Selector(
        Menu.of(PROGRAMS), Features(2, 8), SelectorNetwork(64, len(PROGRAMS) + 1, 0)
    )
    save_selector(
        selector, tmp_path, made.library.model_fingerprint, Policy.parse("steps<=1", DEPTH)
    )
    lm = PolarLM(
        str(folder), backend="eager", max_length=LENGTH, predictor=str(tmp_path), batch_size=4
    )
    contexts = [f"{a}{b}" for a in "abc" for b in "123"]
    _scores(lm, [(c, "=") for c in contexts])
    ids = torch.tensor([tokenizer.encode(c) for c in contexts])
    wanted = [
        str(d.program)
        for d in made.dispatch_by(selector, policy="steps<=1", unprepared="link").choose(ids)
    ]
    assert len(set(wanted)) > 1 and lm.report()["policy"] == "steps<=1"
    assert _ran(lm) == {p: wanted.count(p) for p in wanted}


def test_refusals_name_value_and_remedy(
    folder: Path, compiled: Any, tokenizer: Any, tmp_path: Path
) -> None:
    lm, place, bad = PolarLM(compiled, tokenizer), str(folder), cast(Any, "guess")
    (tmp_path / "file").touch()
    for message, call in {
        "needs the tokenizer": lambda: PolarLM(compiled),
        "policy='identity'.*compiled already": lambda: PolarLM(
            compiled, tokenizer, policy="identity"
        ),
        "exclude each other": lambda: PolarLM(place, program="skip 3", policy="identity"),
        "dtype is 'int8'; use one of": lambda: PolarLM(place, dtype="int8"),
        "cannot go to device='nowhere'": lambda: PolarLM(place, device="nowhere"),
        "batch_size is 'auto'": lambda: PolarLM(compiled, tokenizer, batch_size="auto"),
        "batch_size is 0": lambda: PolarLM(compiled, tokenizer, batch_size=0),
        "64 tokens.*max_length=63": lambda: _scores(lm, [("a", "b" * 64)]),
        "0 tokens.*not empty": lambda: _scores(lm, [("a", "")]),
        "max_gen_toks=63 leaves no room": lambda: _texts(lm, [("a", {"max_gen_toks": 63})]),
        "unknown kind of task 'guess'": lambda: local_task("addition", tmp_path, 1, kind=bad),
        "direct@1 is a chat's": lambda: local_task("addition", tmp_path, 1, template=DIRECT),
        "cannot be written": lambda: local_task("addition", tmp_path / "file", 1),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("polar_fx.lm_harness")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="pip install"):
        __import__("polar_fx.lm_harness")

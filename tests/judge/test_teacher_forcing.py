"""Teacher-forced verdicts: what generation gives, whatever is shared, batched or forgotten."""

import random
from typing import Any

import pytest
import torch

import polar_fx
from polar_fx.compiled import CompiledModel
from polar_fx.errors import InputError, KvOverflowError, ProgramError, WeightsReplacedError
from polar_fx.judge.by_generation import Generation
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, generate, get_template
from slow_cases import some_slow
from tiny_search import generated, peaked, questions, random_programs

DEPTH = 6
PROGRAMS = random_programs(DEPTH, 40)


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return polar_fx.compile(peaked(), "eager", max_length=47, cache=False)


@pytest.fixture(scope="module")
def pairs(compiled: CompiledModel) -> list[tuple[EncodedQuestion, Program]]:
    found = [(q, p) for q in questions(compiled, PROGRAMS) for p in PROGRAMS]
    random.Random(1).shuffle(found)
    return found


def scores(
    compiled: CompiledModel, question: EncodedQuestion, *, program: Program
) -> tuple[float, float]:
    """Log-likelihood and margin of the answer given or else the likeliest, from plain forward
    passes.
    """
    found = []
    for target in question.targets:
        ids = torch.tensor([question.prefix + question.prompt + target])
        logits = compiled.forward(ids, program=program)[0, -len(target) - 1 : -1]
        gold = torch.tensor(target)[:, None]
        margin = logits.gather(-1, gold) - logits.scatter(-1, gold, -torch.inf).amax(
            -1, keepdim=True
        )
        found.append((float(logits.log_softmax(-1).gather(-1, gold).sum()), float(margin.min())))
    return max(found, key=lambda s: (s[1] > 0, s[0]))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_verdict_is_what_generation_gives(
    compiled: CompiledModel, pairs: Any, deterministic: bool
) -> None:
    verdicts = TeacherForcing(compiled, deterministic=deterministic).evaluate(pairs)
    right = 0
    for (question, program), verdict in zip(pairs, verdicts, strict=True):
        tokens = generated(
            compiled, question, program=program, tokens=max(map(len, question.targets))
        )
        assert verdict.correct == any(tokens[: len(t)] == t for t in question.targets), (
            question.id,
            str(program),
        )
        log_likelihood, margin = scores(compiled, question, program=program)
        assert verdict.log_likelihood == pytest.approx(log_likelihood, abs=1e-3)
        assert verdict.margin == pytest.approx(margin, abs=1e-3)
        right += verdict.correct
    assert 10 < right < len(pairs) - 10  # both kinds of verdict were tested


@pytest.mark.parametrize(
    "family", some_slow(["gpt2", "gemma2", "mixtral", "phi3"], ["mixtral", "phi3"])
)
def test_positions_windows_and_experts_of_other_families(family: str) -> None:
    options = {} if family != "gpt2" else {"n_layer": DEPTH}
    compiled = polar_fx.compile(
        peaked(family, DEPTH, **options), "eager", max_length=47, cache=False
    )
    asked = questions(compiled, PROGRAMS, count=3)
    pairs = [(q, p) for q in asked for p in PROGRAMS[:12]]
    for (question, program), verdict in zip(
        pairs, TeacherForcing(compiled).evaluate(pairs), strict=True
    ):
        log_likelihood, _ = scores(compiled, question, program=program)
        assert verdict.log_likelihood == pytest.approx(log_likelihood, abs=2e-3), str(program)


def labels(verdicts: list[Verdict]) -> list[bool]:
    return [verdict.correct for verdict in verdicts]


def test_steps_are_shared_and_kept(compiled: CompiledModel, pairs: Any) -> None:
    forcing = TeacherForcing(compiled)
    first = forcing.evaluate(pairs)
    assert 0 < forcing.steps_run < forcing.steps_asked
    run = forcing.steps_run
    assert forcing.evaluate(pairs) == first
    assert forcing.steps_run == run, "the second time nothing was left to run"
    longer = [(q, Program(DEPTH, (*p.path, 3), p.blends)) for q, p in pairs]
    forcing.evaluate(longer)
    prefixes = len({q.prefix for q, _ in pairs} - {()})
    rows = {(q.id, t) for q, _ in pairs for t in q.targets}
    assert forcing.steps_run - run <= (len(rows) + prefixes) * len({p.path for _, p in longer}), (
        "one more step each"
    )


def test_each_step_runs_once_per_row(compiled: CompiledModel) -> None:
    question = EncodedQuestion("q", (), (1, 2, 3), ((4,),))
    programs = [
        Program.parse(text, DEPTH) for text in ("identity", "skip 5", "skip 4-5", "repeat 3")
    ]
    forcing = TeacherForcing(compiled)
    forcing.evaluate([(question, p) for p in programs])
    # identity holds the two that skip the end; the fourth leaves it after 0-3 and runs 3 4 5
    assert (forcing.steps_run, forcing.steps_asked) == (6 + 3, 6 + 5 + 4 + 7)


@pytest.mark.parametrize("cache_bytes", [0, 100_000])
def test_verdicts_do_not_depend_on_what_is_kept(
    compiled: CompiledModel, pairs: Any, cache_bytes: int
) -> None:
    wanted = TeacherForcing(compiled, deterministic=True).evaluate(pairs)
    forcing = TeacherForcing(compiled, deterministic=True, cache_bytes=cache_bytes)
    for start in range(0, len(pairs), 50):
        assert forcing.evaluate(pairs[start : start + 50]) == wanted[start : start + 50]
        assert forcing.trie.num_bytes <= cache_bytes


def test_deterministic_verdicts_have_the_same_bits_alone_and_among_others(
    compiled: CompiledModel, pairs: Any
) -> None:
    together = TeacherForcing(compiled, deterministic=True).evaluate(pairs)
    alone = [
        TeacherForcing(compiled, deterministic=True).evaluate([pair])[0] for pair in pairs[:60]
    ]
    assert together[:60] == alone
    assert TeacherForcing(compiled, deterministic=True).evaluate(pairs[::-1])[::-1] == together


@pytest.mark.parametrize("rows, tokens", [(1, 1), (3, 20), (64, 1024)])
def test_batches_of_any_size(compiled: CompiledModel, pairs: Any, rows: int, tokens: int) -> None:
    verdicts = TeacherForcing(compiled, max_rows=rows, max_tokens=tokens).evaluate(pairs[:80])
    wanted = TeacherForcing(compiled, deterministic=True).evaluate(pairs[:80])
    assert labels(verdicts) == labels(wanted)


def test_forgotten_questions_leave_nothing_behind(compiled: CompiledModel, pairs: Any) -> None:
    forcing = TeacherForcing(compiled)
    forcing.evaluate([(q, p) for q, p in pairs if not q.prefix])
    assert forcing.trie.num_bytes > 0
    forcing.forget({q.id for q, _ in pairs})
    assert forcing.trie.num_bytes == 0
    assert not forcing.trie.root.children, "nodes go with the last of their states"


def test_a_question_may_change_under_its_id(compiled: CompiledModel) -> None:
    forcing = TeacherForcing(compiled)
    identity = Program.identity(DEPTH)
    for prompt in ((1, 2), (3,), (1, 2)):
        question = EncodedQuestion("same", (5, 6), prompt, ((7, 8),))
        (verdict,) = forcing.evaluate([(question, identity)])
        assert verdict.log_likelihood == pytest.approx(
            scores(compiled, question, program=identity)[0], abs=1e-3
        )


def test_a_nan_of_one_row_does_not_reach_another() -> None:
    model = peaked()
    with torch.no_grad():
        model.model.embed_tokens.weight[39] = float("nan")
    with pytest.warns(polar_fx.errors.ModelWarning):
        compiled = polar_fx.compile(model, "eager", max_length=47, cache=False)
    healthy = EncodedQuestion("healthy", (), (1, 2, 3), ((4,),))
    ill = EncodedQuestion("ill", (), (1, 39, 3, 5), ((4,),))
    forcing = TeacherForcing(compiled)
    identity = Program.identity(DEPTH)
    (sick,) = forcing.evaluate([(ill, identity)])
    assert not sick.correct
    first, second = forcing.evaluate([(healthy, identity), (ill, identity)])
    assert first.log_likelihood == pytest.approx(
        scores(compiled, healthy, program=identity)[0], abs=1e-3
    )
    assert not second.correct


@pytest.mark.parametrize(
    "question, error, message",
    [
        (EncodedQuestion("q", (), (), ((1,),)), InputError, "'q' has an empty prompt or answer"),
        (EncodedQuestion("q", (), (1,), ((),)), InputError, "'q' has an empty prompt or answer"),
        (EncodedQuestion("q", (), (1,), ()), InputError, "'q' has an empty prompt or answer"),
        (
            EncodedQuestion("q", (1,) * 40, (1,) * 6, ((1, 2, 3),)),
            KvOverflowError,
            "take 48 tokens .*max_length=48 or more",
        ),
        (EncodedQuestion("q", (), (1, 40), ((1,),)), InputError, "outside the vocabulary 0..39"),
        (EncodedQuestion("q", (), (1,), ((-1,),)), InputError, "outside the vocabulary 0..39"),
    ],
)
def test_bad_questions_are_refused_before_anything_runs(
    compiled: CompiledModel, question: EncodedQuestion, error: type[Exception], message: str
) -> None:
    forcing = TeacherForcing(compiled)
    good = EncodedQuestion("good", (), (1,), ((1,),))
    with pytest.raises(error, match=message):
        forcing.evaluate([(good, Program.identity(DEPTH)), (question, Program.identity(DEPTH))])
    assert forcing.steps_run == 0


def test_a_program_of_another_depth_is_refused(compiled: CompiledModel) -> None:
    with pytest.raises(ProgramError, match="depth 7"):
        TeacherForcing(compiled).evaluate(
            [(EncodedQuestion("q", (), (1,), ((1,),)), Program.identity(7))]
        )


def test_compiled_regions_judge_as_the_interpreter_does(
    compiled: CompiledModel, pairs: Any
) -> None:
    fast = polar_fx.compile(peaked(), "inductor", max_length=47, cache=False)
    wanted = TeacherForcing(compiled).evaluate(pairs)
    for verdict, expected in zip(TeacherForcing(fast).evaluate(pairs), wanted, strict=True):
        assert verdict.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-3)


@pytest.mark.slow
def test_the_default_model_answers_as_it_generates(smollm2: tuple[Any, Any]) -> None:
    """Text in, text out: generation and grading agree with teacher forcing on a real model and
    tokenizer.
    """
    model, tokenizer = smollm2
    compiled = polar_fx.compile(model, "eager", max_length=127)
    texts = ("identity", "skip 5", "skip 20-21", "repeat 12", "skip 10-25")
    programs = [Program.parse(text, 30) for text in texts]
    found: list[Verdict] = []
    for task in ("addition", "multiplication"):
        template, rows = get_template("few-shot", task), generate(task, 3, split="train")
        pairs = [(e, p) for e in template.encode_all(tokenizer, rows) for p in programs]
        found += TeacherForcing(compiled).evaluate(pairs)
        graded = Generation(
            compiled, tokenizer, questions={q.id: q for q in rows}, templates={task: template}
        ).evaluate(pairs)
        assert labels(found[-len(pairs) :]) == labels(graded)
    assert {v.correct for v in found} == {True, False}


def test_autocast_changes_no_verdict(compiled: CompiledModel, pairs: Any) -> None:
    want = TeacherForcing(compiled).evaluate(pairs[:20])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert TeacherForcing(compiled).evaluate(pairs[:20]) == want
        assert torch.is_autocast_enabled("cpu")


def test_verdicts_of_a_model_whose_weights_were_exchanged_are_refused(pairs: Any) -> None:
    model = peaked()
    judge = TeacherForcing(polar_fx.compile(model, "eager", max_length=47, cache=False))
    before = judge.evaluate(pairs[:2])
    weights = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    with pytest.raises(WeightsReplacedError, match="compile the model again"):
        judge.evaluate(pairs[:2])
    assert len(before) == 2

"""Generated answers: how they are asked for, cut off and read, and what is made of several."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evaluation_samples import IDENTITY, SHORT
from polar_fx.evaluation import answers
from polar_fx.evaluation.answers import Answer, Answerer, Rescues, Row
from polar_fx.questions import EncodedQuestion, Question
from polar_fx.questions.prompts import DecodeStop

STOP = 9  # this token ends an answer; the others are digits
VOCABULARY = 10


def answer(text: str, tokens: int = 1, *, stopped: bool = True, likelihood: float = 0.0) -> Answer:
    return Answer(text, tokens, stopped, likelihood)


class Digits:
    """A tokenizer whose token n is the digit n; 9 is special."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        left = [int(i) for i in ids if not (skip_special_tokens and int(i) == STOP)]
        return "".join(map(str, left))


class Template:
    """A prompt of which only the stop matters."""

    def __init__(self, *strings: str) -> None:
        self.strings = strings

    def decode_stop(self, tokenizer: Any) -> DecodeStop:
        return DecodeStop((STOP,), self.strings, 4)


class Echo:
    """A model that says its prompt's last token, then the number of its call, then stops; each
    token with the logit 1 among zeros.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int], dict[str, Any]]] = []

    def generate(self, ids: torch.Tensor, *, program: Any, **arguments: Any) -> Any:
        self.calls.append((str(program), ids[:, -1].tolist(), arguments))
        copies = arguments.get("num_return_sequences", 1)
        last = ids[:, -1].repeat_interleave(copies)
        call = torch.full_like(last, len(self.calls))
        new = torch.stack([last, call, torch.full_like(last, STOP), torch.zeros_like(last)], 1)
        logits = torch.nn.functional.one_hot(new, VOCABULARY).float()
        sequences = torch.cat([ids.repeat_interleave(copies, 0), new], 1)
        return SimpleNamespace(sequences=sequences, logits=list(logits.unbind(1)))


def row(name: str, task: str, *prompt: int) -> Row:
    return Question(name, task, "?", ("1",)), EncodedQuestion(name, (), prompt, ((1,),))


def answerer(model: Echo, *strings: str, **options: Any) -> Answerer:
    templates: Any = {"add": Template(*strings), "mul": Template()}
    return Answerer(model, Digits(), templates=templates, **options)  # type: ignore[arg-type]


ROWS = [row("a", "add", 1, 2, 3), row("b", "mul", 4), row("c", "add", 5), row("d", "add", 6, 7)]


def test_greedy_answers_come_in_order_and_run_program_and_task_together() -> None:
    model, seen = Echo(), []
    pairs = [(ROWS[0], IDENTITY), (ROWS[1], IDENTITY), (ROWS[2], SHORT), (ROWS[3], IDENTITY)]
    found = answerer(model, batch=8, progress=seen.append).greedy(pairs)
    # identity on "add": rows d and a, the shorter first; then identity on "mul"; then the other
    assert [(p, ids) for p, ids, _ in model.calls] == [
        (str(IDENTITY), [7, 3]),
        (str(IDENTITY), [4]),
        (str(SHORT), [5]),
    ]
    assert [a.text for a in found] == ["31", "42", "53", "71"] and seen == [2, 1, 1]
    assert all(arguments["do_sample"] is False for _, _, arguments in model.calls)


def test_batches_are_no_larger_than_asked_with_all_samples_counted() -> None:
    model = Echo()
    answerer(model, batch=2).greedy([(each, IDENTITY) for each in (ROWS[0], ROWS[2], ROWS[3])])
    assert [len(ids) for _, ids, _ in model.calls] == [2, 1]
    model = Echo()
    found = answerer(model, batch=4).sampled(
        [ROWS[0], ROWS[2], ROWS[3]], IDENTITY, count=2, temperature=0.7, seed=3
    )
    assert [len(ids) for _, ids, _ in model.calls] == [2, 1]
    for sampled, text in zip(found, ("32", "51", "71"), strict=True):
        assert [answer.text for answer in sampled] == [text, text]
    given = model.calls[0][2]
    assert (given["do_sample"], given["temperature"], given["num_return_sequences"]) == (
        True,
        0.7,
        2,
    )


def test_sampling_leaves_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    answerer(Echo()).sampled([ROWS[0]], IDENTITY, count=2, temperature=0.7, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_ends_with_its_stop_and_counts_what_was_generated_up_to_it() -> None:
    (found,) = answerer(Echo()).greedy([(ROWS[0], IDENTITY)])
    # three tokens, each with the logit 1 among nine zeros
    each = 1 - torch.tensor([1.0] + [0.0] * 9).logsumexp(0).item()
    assert (found.text, found.num_tokens, found.stopped) == ("31", 3, True)
    assert found.log_likelihood == pytest.approx(3 * each)


def test_an_answer_ends_before_a_string_that_stops_it() -> None:
    (found,) = answerer(Echo(), "1").greedy([(ROWS[0], IDENTITY)])
    assert (found.text, found.num_tokens, found.stopped) == ("3", 2, True)


def test_an_answer_that_never_stops_is_all_that_was_generated() -> None:
    class Endless(Template):
        def decode_stop(self, tokenizer: Any) -> DecodeStop:
            return DecodeStop((), ("x",), 4)

    templates: Any = {"add": Endless()}
    made: Any = Answerer(Echo(), Digits(), templates=templates)  # type: ignore[arg-type]
    (found,) = made.greedy([(ROWS[0], IDENTITY)])
    assert (found.text, found.num_tokens, found.stopped) == ("310", 4, False)


@pytest.mark.parametrize(
    ("texts", "place"),
    [
        (["7"], 0),
        (["7", "8", "8"], 1),
        (["7", "8"], 0),
        (["8", "7", "7", "8", "9"], 0),
        ([" 7 ", "8", "7"], 0),
        ([r"\boxed{7} or so", "8", "8", "7", "7"], 0),
    ],
)
def test_the_majority_is_the_earliest_of_the_most_frequent(texts: list[str], place: int) -> None:
    assert answers.majority([answer(text) for text in texts]) == place


def test_the_most_confident_answer_is_likeliest_by_the_token() -> None:
    # -1, -0.5 and -2 a token; an empty answer counts as one token
    three = [
        answer("a", 2, stopped=True, likelihood=-2.0),
        answer("b", 10, stopped=True, likelihood=-5.0),
        answer("c", 1, stopped=True, likelihood=-2.0),
    ]
    assert answers.most_confident(three) == 1
    assert answers.most_confident([*three, answer("", 0, stopped=True, likelihood=-0.25)]) == 3
    assert answers.most_confident([three[2], three[2]]) == 0


NUMBER, WORD = Question("n", "t", "?", ("1,200", "1200")), Question("w", "t", "?", ("Paris", "3"))


@pytest.mark.parametrize(
    ("text", "question", "stopped", "expected"),
    [
        ("7", NUMBER, True, True),
        ("-1,000", NUMBER, True, True),
        (r"so \boxed{7}", NUMBER, True, True),
        ("7", NUMBER, False, False),
        ("seven", NUMBER, True, False),
        ("7 apples", NUMBER, True, False),
        ("", NUMBER, True, False),
        ("London", WORD, True, True),  # a number is not the only kind that is accepted
        ("  ", WORD, True, False),
    ],
)
def test_which_answers_can_be_read(
    text: str, question: Question, stopped: bool, expected: bool
) -> None:
    assert answers.is_parsable(answer(text, stopped=stopped), question) is expected


def test_an_answer_is_right_in_whatever_form() -> None:
    pytest.importorskip("math_verify")
    assert answers.is_right(answer(r"It is \boxed{1200}."), NUMBER)
    assert answers.is_right(answer("paris"), WORD) and not answers.is_right(answer("12"), NUMBER)


def test_rescues_by_hand() -> None:
    yes, no = True, False
    # identity exact, identity graded, exact, graded
    rows = [
        (no, no, yes, yes),  # reasoning
        (no, no, no, yes),  # reasoning, in another form
        (no, yes, yes, yes),  # only the form was wrong
        (no, yes, yes, no),  # the form, but graded wrong: lost as well
        (yes, yes, no, no),  # lost
        (yes, yes, yes, yes),
        (no, no, no, no),
        (yes, yes, no, yes),  # exact no longer, still right
    ]
    before, graded_before, after, graded = zip(*rows, strict=True)
    assert Rescues.of(before, graded_before, exact=after, graded=graded) == Rescues(
        reasoning=2, format=2, lost=2
    )
    assert Rescues.of([], [], exact=[], graded=[]) == Rescues(0, 0, 0)
    with pytest.raises(ValueError, match="shorter"):
        Rescues.of([yes], [yes], exact=[yes], graded=[])

"""Grading: what counts as the answer, what equals it, and that no text hangs or breaks it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from places import ROOT
from polar_fx.errors import InputError
from polar_fx.judge import grading
from polar_fx.judge.grading import Extracted, extract, grade
from polar_fx.questions import Question

pytest.importorskip("math_verify")


def _question(*answers: str) -> Question:
    return Question("q", "t", "?", answers)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process of this test's own, and nothing remembered from other tests."""
    fresh = grading._Worker()
    monkeypatch.setattr(grading, "_WORKER", fresh)
    grading._equal.cache_clear()
    yield fresh
    fresh.close()
    grading._equal.cache_clear()


@pytest.mark.parametrize(
    ("text", "answer", "boxed"),
    [
        (" 42 ", "42", False),
        (r"So it is \boxed{42}. Or \boxed{43}", "42", True),
        (r"\boxed{\frac{1}{2}}}}", r"\frac{1}{2}", True),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", True),
        (r"\boxed{\}}", r"\}", True),
        (r"\boxed{}", "", True),
        (r"\boxed{42", r"\boxed{42", False),
        (r"\boxed{4\boxed{2}", r"\boxed{4\boxed{2}", False),
        ("", "", False),
    ],
)
def test_the_first_box_counts(text: str, answer: str, boxed: bool) -> None:
    assert extract(text) == Extracted(answer, boxed)


def test_what_follows_a_stop_does_not_count() -> None:
    assert extract(" 42\n\\boxed{43}\n", ("\n",)) == Extracted("42", False)
    assert extract("4;2\n3", ["\n", ";"]) == Extracted("4", False)
    assert grade(" 19\nQ: 3 + 4", _question("19"), stops=("\n",)) and not grade(
        " 19\nQ: 3 + 4", _question("19")
    )


@given(st.text())
def test_any_text_has_an_answer(text: str) -> None:
    found = extract(text)
    assert found.answer == found.answer.strip() and found.answer in text
    assert found.boxed or found.answer == text.strip()


@given(st.text(alphabet="ab{}\\ ", max_size=12))
def test_a_box_holds_what_was_put_in(inside: str) -> None:
    if grading._closing(inside + "}") == len(inside):
        assert extract(f"x \\boxed{{{inside}}} y") == Extracted(inside.strip(), True)


EQUAL = [
    ("42", "42"),
    ("42", " 42."),
    ("42", "+042"),
    ("42", "42.0"),
    ("42", "$42$"),
    ("42", r"\text{42}"),
    ("42", "x = 42"),
    ("42", r"42\text{ apples}"),
    ("42", r"\boxed{42}"),
    ("-7", "-7"),
    ("0", "-0"),
    ("1000", "1,000"),
    ("1000", r"1{,}000"),
    ("1000", r"1\,000"),
    ("10000", r"10,\!000"),
    ("3", "12/4"),
    ("0.5", r"\frac12"),
    ("1/2", "0.5"),
    ("1/2", r"50\%"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt 2}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("(0,5)", "(0, 5)"),
    (r"\{1,2\}", r"\{2, 1\}"),
    (r"2\pi", r"\pi \cdot 2"),
    ("yes", "Yes."),
    (r"\text{east}", "East"),
    ("New York", "new  york"),
    ("x", "x"),
    ("9" * 5000, "0" + "9" * 5000),
]
DIFFERENT = [
    ("42", "43"),
    ("42", "-42"),
    ("42", ""),
    ("42", "forty-two"),
    ("42", "The answer is 42"),
    ("42", "42 43"),
    ("42", "4 2"),
    ("3", "1 2"),
    ("12", "12 or 13"),
    ("42", r"\boxed{42"),
    ("42", r"\boxed{}"),
    ("42", "42} and {43"),
    ("42", r"\frac{42"),
    ("yes", "sey"),
    ("yes", "no"),
    ("(0,5)", "(5,0)"),
    ("x", "y"),
    ("2", "9" * 5000),
    ("x+1", "(" * 300 + "x+1"),
]
# a calculation in place of a number: what a model that repeats the question says
UNDONE = [
    ("19", "12 + 7"),
    ("19", "x = 12 + 7"),
    ("56", "7 * 8"),
    ("56", r"7 \times 8"),
    ("5", "12 - 7"),
    ("8", "2^3"),
    ("3", r"\{1+2\}"),
]


@pytest.mark.parametrize(("accepted", "answer"), EQUAL)
def test_equal(accepted: str, answer: str) -> None:
    assert grade(answer, _question(accepted)) and grade(
        f"so \\boxed{{{answer}}} and", _question("nothing", accepted)
    )


@pytest.mark.parametrize(("accepted", "answer"), DIFFERENT + UNDONE)
def test_different(accepted: str, answer: str) -> None:
    assert not grade(answer, _question(accepted))


def test_a_calculation_is_fine_where_it_is_the_answer() -> None:
    assert grade(r"\sqrt{2} + 1", _question(r"1+\sqrt{2}")) and grade("2^{10}", _question("2^10"))


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_integers(a: int, b: int) -> None:
    assert grade(f" {a}", _question(str(b))) == (a == b)
    assert grade(f"{a:,}", _question(str(a)))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="0123456789+-*/^(){}\\ .,=%!$frac\n", max_size=25))
def test_no_text_breaks_it(text: str) -> None:
    assert grade(text, _question("123456789", r"\frac{355}{113}")) in (False, True)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9^{9^{9}}",
        r"10^{10^{10^{10}}}",
        "1000000000!",
        r"\binom{10000000}{5000000}",
        r"\sin(9^{9^9})",
    ],
)
def test_gigantic_expressions_are_wrong_within_seconds(text: str) -> None:
    started = time.monotonic()
    assert not grade(text, _question("2")) and not grade(text, _question(r"2\pi"))
    assert time.monotonic() - started < 20


def _worker_code(body: str) -> str:
    """A grading process with something replaced; `g` is its module."""
    return (
        "import sys; sys.path.insert(0, sys.argv[1]); import polar_fx.judge.grading_worker as "
        f"g\n{body}\ng.main()"
    )


def test_what_nothing_can_interrupt_ends_the_process(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation inside C holds the interpreter: no alarm gets through."""
    stuck = "g._GIVE_UP = 0.3\ng._equal = lambda a, b: b == 'x' or sum(range(10**12))"
    monkeypatch.setattr(grading, "_START", _worker_code(stuck))
    assert not grade("y", _question("z"))
    assert worker._process is None
    monkeypatch.undo()
    monkeypatch.setattr(grading, "_WORKER", worker)
    assert grade("x+1", _question("1+x"))  # with a new one


def test_a_process_killed_from_outside_is_started_again_once(
    worker: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert grade("x+1", _question("1+x"))
    os.kill(worker._process.pid, signal.SIGKILL)
    assert grade("x+2", _question("2+x"))
    suicide = (
        "import os, signal\ng._equal = lambda a, b: b == 'x' or os.kill(os.getpid(), "
        "signal.SIGKILL)"
    )
    monkeypatch.setattr(grading, "_START", _worker_code(suicide))
    worker.close()
    with pytest.raises(
        InputError,
        match="process was killed twice while it compared 'x\\+3' with '3\\+x'; free some memory",
    ):
        grade("x+3", _question("3+x"))


def test_a_broken_installation_is_named(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_START", _worker_code("sys.modules['math_verify'] = None"))
    with pytest.raises(
        InputError, match="math-verify cannot be used: its process ended with status 1; see whether"
    ):
        grade("x+3", _question("3+x"))


def test_without_math_verify_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError,
        match=(
            r"math-verify, which is not installed; pip install math-verify, or pip install .*"
            r"\[search\]'"
        ),
    ):
        grade("42", _question("42"))


def test_an_interrupt_does_not_shift_answers(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C while waiting, the next question must not get the answer to the last one."""
    assert not grade("x+1", _question("x+2"))
    real = json.loads

    def interrupted(text: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grade("x+1", _question("1+x"))
    monkeypatch.setattr(json, "loads", real)
    assert not grade("x+1", _question("x+3")) and grade("x+1", _question("1+x"))


def test_threads_share_the_process(worker: Any) -> None:
    wrong: list[tuple[int, int]] = []

    def ask(thread: int) -> None:
        for i in range(12):
            if grade(f"x+{i}", _question(f"{i + i % 2}+x")) != (i % 2 == 0):
                wrong.append((thread, i))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_a_process_of_its_own() -> None:
    code = (
        "import os; from polar_fx.judge import grading; from polar_fx.judge.grading import "
        "grade\nfrom polar_fx.questions import Question\ndef right(i): return grade(f'x+{i}', "
        "Question('q', 't', '?', (f'{i}+x',)))\nassert right(1); pid = "
        "grading._WORKER._process.pid\nchild = os.fork()\nif child == 0: raise SystemExit(0 if "
        "right(2) and grading._WORKER._process.pid != pid else 1)\nassert os.waitpid(child, 0)[1] "
        "== 0 and right(3) and grading._WORKER._process.pid == pid\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_answers_are_remembered(worker: Any) -> None:
    assert grade("x+1", _question("1+x"))
    worker.close()
    assert grade(r"\boxed{x+1}", _question("1+x")) and worker._process is None

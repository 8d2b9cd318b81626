"""Child processes: requests and answers, what is said of one that ended."""

import os
import signal
from collections.abc import Iterator

import pytest

from polar_fx.child_process import KILLED, ChildEndedError, ChildProcess

pytestmark = pytest.mark.child_process

_DOUBLES = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from polar_fx.child_process import answer, answers
with answers() as stream:
    for line in sys.stdin:
        print("noise")
        os.write(1, b"more noise")
        request = json.loads(line)
        if request == "raise":
            raise RuntimeError("first line\\nlast line")
        if request == "half":
            stream.write("[1,")
            break
        answer(stream, request * int(sys.argv[2]))
"""


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    process = ChildProcess(_DOUBLES, "2")
    yield process
    process.kill()


def test_answers_follow_their_requests_and_printing_does_not_disturb_them(
    child: ChildProcess,
) -> None:
    assert child.ask(21) == 42
    assert child.ask("é\n") == "é\né\n"
    assert child.ask([None, {"a": 1}]) == [None, {"a": 1}] * 2
    assert child.is_running and child.pid != os.getpid()


def test_one_that_raised_leaves_its_status_and_last_words(child: ChildProcess) -> None:
    with pytest.raises(ChildEndedError, match="ended with status 1: last line") as raised:
        child.ask("raise")
    assert (raised.value.status, raised.value.last_words) == (1, "last line")
    assert not child.is_running


def test_half_an_answer_is_none(child: ChildProcess) -> None:
    with pytest.raises(ChildEndedError, match="ended with status 0: it said nothing"):
        child.ask("half")


def test_one_killed_by_somebody_else_says_so_then_and_later(child: ChildProcess) -> None:
    os.kill(child.pid, signal.SIGKILL)
    for _ in range(2):  # the first may still find the pipe open
        with pytest.raises(ChildEndedError) as raised:
            child.ask(1)
        assert (raised.value.status, raised.value.last_words) == (KILLED, "")


def test_killing_ends_it_in_the_middle_of_a_request_and_again_is_allowed() -> None:
    process = ChildProcess("import time; print('1', flush=True); time.sleep(600)")
    assert process.read() == 1
    process.kill()
    process.kill()
    assert not process.is_running
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)

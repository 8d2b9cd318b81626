"""The schedule of a batch as a picture."""

import pytest

from polar_fx.errors import InputError
from polar_fx.explain.schedule import schedule
from polar_fx.program import Program


def test_a_skip_a_repeat_and_the_identity_by_hand() -> None:
    texts = ("identity", "skip 1-2", "repeat 1-2 x2")
    found = schedule([Program.parse(text, 5) for text in texts])
    assert found.text() == (
        "layer   0121234\n"
        "row 0   ■■■··■■  0-4 /5\n"
        "row 1   ■····■■  0 3-4 /5\n"
        "row 2   ■■■■■■■  0 (1-2)*2 3-4 /5\n"
        "7 calls for 15 steps of 3 rows: 2.1 rows a call"
    )


def test_layers_of_two_digits_and_groups_of_ten() -> None:
    lines = schedule([Program.identity(12)]).text().splitlines()
    assert lines[0] == "layer" + " " * 14 + "11"
    assert lines[1] == "        0123456789 01"
    assert lines[2] == "row 0   ■■■■■■■■■■ ■■  0-11 /12"


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="no programs"):
        schedule([])
    with pytest.raises(InputError, match=r"depths \[4, 5\]"):
        schedule([Program.identity(4), Program.identity(5)])

"""How far long work is, and how long the rest takes."""

import logging
import re

import pytest

from polar_fx.output import waiting
from polar_fx.output.waiting import Waiting, left_s


def test_each_part_that_is_done_tells_which_comes_next(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, waiting.LOGGER)
    work = Waiting(3, "region", at_once=2, why="nothing fits")
    for _ in range(3):
        work.done()
    begun, *told = caplog.messages
    assert begun == "compiling 3 regions: nothing fits"
    assert [re.sub(r"about .* left", "...", line) for line in told] == [
        "region 2 of 3, ...",
        "region 3 of 3, ...",
    ]


@pytest.mark.parametrize(
    ("done", "at_once", "left"), [(1, 1, 10 * 4.5 / 1.5), (3, 2, 5.0), (5, 4, 10 * 0.5 / 5.5)]
)
def test_parts_under_way_count_as_half_done(done: int, at_once: int, left: float) -> None:
    assert left_s(10, done, total=6, at_once=at_once) == pytest.approx(left)

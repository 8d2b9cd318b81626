"""The process that runs math-verify: reads [accepted, answer] as JSON, a pair a line, and says
whether they are equal.
"""

import contextlib
import faulthandler
import json
import logging
import signal
import sys
from functools import lru_cache
from typing import Any

from ..child_process import answer, answers

READY = "ready"  # said once, before any pair is read
_SECONDS = 2  # math-verify's own limit on one operation
# for one pair; then the process ends itself, also inside an operation that nothing can interrupt
_GIVE_UP = 6.0
_MEMORY = 4 << 30


def main() -> None:
    """Serve pairs from stdin until it closes."""
    # for the parent, which ends this process when it has to
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable()
    with answers() as stream:
        _equal("1/2", "x")  # loads and builds what the first pair would wait for
        answer(stream, READY)
        for line in sys.stdin:
            faulthandler.dump_traceback_later(_GIVE_UP, exit=True)
            try:
                equal = _equal(*json.loads(line))
            except Exception:
                equal = False
            faulthandler.cancel_dump_traceback_later()
            answer(stream, equal)


def _equal(accepted: str, answer: str) -> bool:
    from math_verify import verify

    gold, found = _parse(accepted), _parse(answer)
    if (
        not gold
        or not found
        or (_is_number(gold[0]) and not (_is_number(found[0]) or "%" in answer))
    ):
        return False
    return verify(list(gold), list(found), timeout_seconds=_SECONDS)


def _is_number(parsed: Any) -> bool:
    """A number, or an equation or set that gives one; not what is still to be calculated."""
    from sympy import FiniteSet, Number
    from sympy.core.relational import Relational

    if isinstance(parsed, Relational):
        return _is_number(parsed.rhs)
    if isinstance(parsed, FiniteSet):
        return all(map(_is_number, parsed.args))
    return isinstance(parsed, Number)


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    # in a box, all of it is the answer; elsewhere math-verify picks what looks like one
    return tuple(
        parse(
            f"\\boxed{{{text}}}",
            [LatexExtractionConfig(boxed_match_priority=0)],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=_SECONDS,
        )
    )

"""Small models to explain and report on, and what their parts weigh."""

import functools
import json
from typing import Any

from polar_fx.compiled import CompiledModel, compile
from polar_fx.explain.program_report import Explanation, Report
from tiny_models import make

PROGRAM = "0 (2-3)*2@0.5 /4"  # skip, repeat and damping
# weights of one layer of the tiny llama: attention, feed-forward, two norms; fp32
LAYER_BYTES = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
KV_BYTES = 4 * 2 * (8 + 8)  # a token and step: two heads, keys and values of 8


def fresh(family: str = "llama", **options: Any) -> CompiledModel:
    return compile(make(family), "eager", max_length=31, **{"cache": False, **options})


# Shared, and never run: most tests only look.
eager = functools.cache(fresh)


def round_trip(part: Report | Explanation) -> dict[str, Any]:
    plain = part.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    return plain

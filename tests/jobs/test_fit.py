"""How long the whole way from questions to a predictor is said to take."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polar_fx.jobs import fit, search, stages
from polar_fx.jobs.questions import Asked


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([8.0, 9.0], 9.0),  # all was compiled before
        ([0.1, 0.5, 9.0, 10.0], 10.0),  # two searches compiled
        ([0.1, 0.5, 2.0, 9.0, 9.0], 9.0),  # it ends somewhere
    ],
)
def test_the_rate_is_one_of_a_search_that_compiles_nothing(
    rates: list[float], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(rates)

    def run(job: search.SearchJob, *_: Any) -> SimpleNamespace:
        assert job.workers == 1 and tmp_path not in job.out.parents, "records are not kept"
        return SimpleNamespace(evaluations_per_second=left.pop(0), seconds=0.0)

    monkeypatch.setattr(search, "run", run)
    job = stages.Stages(out=tmp_path, asked=Asked(tasks=("addition",)), size=fit.PRESETS["quick"])
    assert job.probe().evaluations_per_second == expected

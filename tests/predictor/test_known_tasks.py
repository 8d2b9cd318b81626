"""Which task an input is of: planted tasks are told apart, and what is unlike them is none."""

import pytest
import torch

from polar_fx.errors import InputError
from polar_fx.predictor.known_tasks import UNKNOWN, KnownTasks

NAMES = ("add", "multiply", "count")


def drawn(n: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Features f32[n, 40]: tasks differ in small directions, and vary much in others."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(n) % 3
    features = torch.randn(n, 40, generator=generator) * 0.05
    features[:, 3:9] *= 100
    features[torch.arange(n), place] += 1
    return features + 7, [NAMES[g] for g in place]


def learned(n: int = 300) -> KnownTasks:
    (features, tasks), (others, own) = drawn(n, 0), drawn(300, 1)
    return KnownTasks.learn(features, tasks, others=others, tasks_of_others=own)


@pytest.mark.parametrize("n", [12, 300])
def test_planted_tasks_are_told_apart(n: int) -> None:
    known = learned(n)
    features, tasks = drawn(600, 2)
    found = known.recognized(features)
    wrong = [a for a, b in zip(found, tasks, strict=True) if a not in (b, UNKNOWN)]
    assert known.names == NAMES and not wrong
    assert found.count(UNKNOWN) < 30, "validation says how far questions lie from their mean"


def test_what_is_unlike_all_tasks_is_none_of_them() -> None:
    known, (features, _) = learned(), drawn(9, 3)
    strange = features.clone()
    strange[:, :3] = 7 + 3.0
    assert known.recognized(strange) == [UNKNOWN] * 9
    assert known.recognized(features * torch.nan) == [UNKNOWN] * 9


def test_a_direction_without_variation_does_not_count_without_end() -> None:
    features, tasks = drawn(300, 0)
    features[:, 20] = 0.0
    known = KnownTasks.learn(features, tasks, others=features, tasks_of_others=tasks)
    assert known.recognized(features).count(UNKNOWN) < 10


def test_parts_that_do_not_fit_are_refused() -> None:
    (features, tasks), known = drawn(30, 0), learned()
    two = KnownTasks.learn(
        features, tasks, others=features[:2], tasks_of_others=["add", "multiply"]
    )
    assert "count" not in two.recognized(features), "how far its questions lie is not known"
    with pytest.raises(InputError, match="2 tasks, a projection of 40 x"):
        KnownTasks(NAMES[:2], known.center, known.projection, known.means, known.limits)

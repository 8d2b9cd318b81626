"""Shares as JSON values, which several tests expect."""

from polar_fx.stats.intervals import Share


def share(count: int, n: int) -> dict[str, object]:
    return Share(count, n).to_dict()

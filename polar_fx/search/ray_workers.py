"""Searching on a Ray cluster: the same searches and the same store as with processes, on any number of machines.

Ray is optional (`pip install 'polar_fx[ray]'`). The driver alone writes the store.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import CompileError, InputError
from .config import SearchConfig
from .records import SearchRecord
from .workers import Row, Workplace


def search_on_ray(
    workplace: Workplace, rows: Sequence[Row], config: SearchConfig, workers: int, address: str | None = None
) -> Iterator[SearchRecord]:
    """Records as they finish, from `workers` actors. `address` None starts Ray on this machine.

    Questions are dealt out in turn. Raises InputError if Ray is not installed, CompileError if an actor is lost (searching again
    finishes its questions), and what goes wrong in an actor.
    """
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError("searching on a cluster needs ray, which is not installed; pip install 'polar_fx[ray]'") from error

    class Searcher:
        def search(self, rows: Sequence[Row]) -> Iterator[SearchRecord]:
            place = workplace.open([question for question, _ in rows])
            yield from place.search(iter(rows), config)

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    actor_class: Any = ray.remote(num_cpus=workplace.threads or 1)(Searcher)
    try:
        shares = [rows[i::workers] for i in range(min(workers, len(rows)))]
        actors = [actor_class.remote() for _ in shares]
        streams = [a.search.options(num_returns="streaming").remote(share) for a, share in zip(actors, shares, strict=True)]
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, fetch_local=False)
            for stream in ready:
                try:
                    reference = next(stream)
                except StopIteration:
                    streams.remove(stream)
                    continue
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    raise CompileError(f"an actor was lost: {error}; search again to finish its questions") from error
    finally:
        if started_here:
            ray.shutdown()

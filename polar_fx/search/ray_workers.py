"""Searching on a Ray cluster: the same searches and the same store as with processes, on any number
of machines.

Ray is optional (`pip install 'polar_fx[ray]'`). The driver alone writes the store.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..environment import install_command
from ..errors import CompileError, InputError, PolarError
from ..output.others import hush_others
from ..output.plain_text import count
from .config import SearchConfig
from .records.records import SearchRecord
from .workers import Row, Workplace

log = logging.getLogger("polar_fx.search")

# parts of the questions that each worker is dealt, so that a slow machine does not keep what others
# could do
_ROUNDS = 4


def search_on_ray(
    workplace: Workplace,
    rows: Sequence[Row],
    *,
    config: SearchConfig,
    workers: int,
    address: str | None = None,
) -> Iterator[SearchRecord]:
    """Records as they finish, from up to `workers` actors of `workplace.threads` processors
    (default: 1) each.

    Args:
        workers: actors asked for. Questions are dealt to those that run; where the cluster has room
            for fewer, fewer search.
        address: the cluster's; None starts Ray on this machine.

    Questions of an actor that is lost, with its machine or alone, are dealt out again and another
    actor is asked for. Raises InputError if Ray is not installed, CompileError once more actors
    than `workers` were lost, and what goes wrong in one.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"searching on a cluster needs ray, which is not installed; {install_command('ray')}"
        ) from error
    questions = [question for question, _ in rows]

    class Searcher:
        place: Any = None

        def search(self, rows: Sequence[Row]) -> Iterator[SearchRecord]:
            if self.place is None:
                hush_others()
                self.place = workplace.open(questions)
            yield from self.place.search(iter(rows), config)

    started_here = not ray.is_initialized()
    if started_here:
        try:
            ray.init(address=address or "local", include_dashboard=False, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"no Ray cluster can be reached at {address!r}: {error}") from error
    searchers: Any = ray.remote(num_cpus=workplace.threads or 1)(Searcher)
    actors = _Actors(
        searchers.remote, _shares(rows, workers, in_flight=workplace.in_flight), workers=workers
    )
    try:
        yield from actors.records()
    finally:
        actors.kill()
        if started_here:
            ray.shutdown()


def _shares(rows: Sequence[Row], workers: int, *, in_flight: int) -> list[list[Row]]:
    """The questions in parts that are dealt one by one, each large enough to keep a worker busy."""
    size = min(-(-len(rows) // workers), max(in_flight, -(-len(rows) // (_ROUNDS * workers))))
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


class _Actors:
    """Up to `workers` actors, what each of them searches, and the shares that none has yet."""

    def __init__(self, start: Callable[[], Any], shares: list[list[Row]], *, workers: int) -> None:
        self._start, self._waiting, self._workers = start, shares, workers
        self._lost = 0
        # a stream of records -> its actor, and the questions still to come
        self._running: dict[Any, tuple[Any, dict[str, Row]]] = {}

    def records(self) -> Iterator[SearchRecord]:
        """All records, as they finish. Raises CompileError, and what goes wrong in an actor."""
        import ray
        from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError

        left = sum(map(len, self._waiting))
        # no question at first: one dealt to an actor that the cluster has no room for would never
        # be searched
        for _ in self._waiting[: self._workers]:
            self._deal(self._start(), ())
        while left:
            ready, _ = ray.wait(list(self._running), num_returns=1, fetch_local=False)
            stream: Any = ready[0]
            try:
                record: Any = ray.get(next(stream))
            except StopIteration:
                self._go_on(stream)
            except (RayActorError, NodeDiedError, ObjectLostError) as error:
                self._replace(stream, error)
            except RayTaskError as error:
                if isinstance(error.cause, PolarError):
                    raise error.cause from error
                raise CompileError(f"a search actor failed: {error}") from error
            else:
                del self._running[stream][1][record.question.id]
                left -= 1
                yield record

    def _deal(self, actor: Any, share: Sequence[Row]) -> None:
        stream = actor.search.options(num_returns="streaming").remote(share)
        left = {question.id: (question, encoded) for question, encoded in share}
        self._running[stream] = actor, left

    def _go_on(self, stream: Any) -> None:
        """Give the next share to an actor that has done its own, or its place to another actor."""
        import ray

        actor, _ = self._running.pop(stream)
        if self._waiting:
            self._deal(actor, self._waiting.pop(0))
        else:
            ray.kill(actor)  # one that replaces a lost actor may wait for the room

    def _replace(self, stream: Any, error: Exception) -> None:
        """Ask for another actor in place of a lost one, whose questions wait again."""
        import ray

        actor, share = self._running.pop(stream)
        ray.kill(actor)  # it may only have been out of reach, and would keep its place
        self._lost += 1
        if self._lost > self._workers:
            raise CompileError(
                f"{self._lost} actors were lost: {error}; search again to finish their questions"
            ) from error
        log.warning(
            "an actor was lost; %s of its share will be searched again",
            count(len(share), "question"),
        )
        if share:
            self._waiting.append(list(share.values()))
        self._deal(self._start(), ())

    def kill(self) -> None:
        """End all actors."""
        import ray

        for actor, _ in self._running.values():
            ray.kill(actor)

"""Searching on a Ray cluster: the same searches and the same store as with processes, on any number
of machines.

Ray is optional (`pip install 'polar_fx[ray]'`). The driver alone writes the store.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import CompileError, InputError, PolarError
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
        from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError
    except ImportError as error:
        raise InputError(
            "searching on a cluster needs ray, which is not installed; pip install 'polar_fx[ray]'"
        ) from error

    class Searcher:
        place: Any = None

        def search(self, rows: Sequence[Row]) -> Iterator[SearchRecord]:
            if self.place is None:
                self.place = workplace.open(questions)
            yield from self.place.search(iter(rows), config)

    started_here = not ray.is_initialized()
    if started_here:
        try:
            ray.init(address=address or "local", include_dashboard=False, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"no Ray cluster can be reached at {address!r}: {error}") from error
    questions = [question for question, _ in rows]
    size = min(
        -(-len(rows) // workers), max(workplace.in_flight, -(-len(rows) // (_ROUNDS * workers)))
    )
    waiting = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    actor_class: Any = ray.remote(num_cpus=workplace.threads or 1)(Searcher)
    # a stream of records -> its actor, and the questions still to come
    running: dict[Any, tuple[Any, dict[str, Row]]] = {}

    def deal(actor: Any, share: Sequence[Row]) -> None:
        stream = actor.search.options(num_returns="streaming").remote(share)
        running[stream] = actor, {question.id: (question, encoded) for question, encoded in share}

    try:
        # no question at first: one dealt to an actor that the cluster has no room for would never
        # be searched
        for _ in waiting[:workers]:
            deal(actor_class.remote(), ())
        left, lost = len(rows), 0
        while left:
            ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            stream: Any = ready[0]
            actor, share = running[stream]
            try:
                record: Any = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                if waiting:
                    deal(actor, waiting.pop(0))
            except (RayActorError, NodeDiedError, ObjectLostError) as error:
                del running[stream]
                ray.kill(actor)  # it may only have been out of reach, and would keep its place
                lost += 1
                if lost > workers:
                    raise CompileError(
                        f"{lost} actors were lost: {error}; search again to finish their questions"
                    ) from error
                log.warning(
                    "an actor was lost; %s of its share will be searched again",
                    count(len(share), "question"),
                )
                if share:
                    waiting.append(list(share.values()))
                deal(actor_class.remote(), ())
            except RayTaskError as error:
                if isinstance(error.cause, PolarError):
                    raise error.cause from error
                raise CompileError(f"a search actor failed: {error}") from error
            else:
                del share[record.question.id]
                left -= 1
                yield record
    finally:
        for actor, _ in running.values():
            ray.kill(actor)
        if started_here:
            ray.shutdown()

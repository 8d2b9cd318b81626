"""Requests that come and go between tokens: prompts in chunks beside rows that decode, each with a
program of its own.

Shape legend: B rows, T tokens, V vocabulary.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..capture.support import without_autocast
from ..errors import EngineFullError, InputError, KvOverflowError
from ..program import Program
from ..runtime.dispatcher import Dispatcher
from ..runtime.runner import Runner
from ..runtime.token_rows import one_row
from ..runtime.uncopied import Uncopied
from .request import Finish, Generated, Request
from .rows import Row, RowRunner
from .sampling import Sampling
from .stable_text import StableText, first_stop

log = logging.getLogger("polar_fx.engine")


@dataclass(frozen=True)
class EngineSettings:
    """How much runs and waits at a time.

    `max_rows` rows run together, and hold at most `max_tokens` tokens, prompts and what may be
    generated; further requests wait, at most `max_waiting` of them. `prefill_tokens` of prompts run
    between two tokens of the rows that decode. Of rows that are done, keys and values of at most
    `kept_bytes` are kept for requests that begin with the same tokens and steps, 0 for none.
    Raises InputError.
    """

    max_rows: int = 32
    max_tokens: int = 1 << 16
    max_waiting: int = 1024
    prefill_tokens: int = 256
    kept_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, least = getattr(self, setting.name), int(setting.name != "kept_bytes")
            if type(value) is not int or value < least:
                raise InputError(
                    f"{setting.name} must be a whole number of at least {least}, got {value!r}"
                )


class Engine(Uncopied):
    """Serves requests on a model's runner. A context manager that runs them in a thread of its own;
    without it, call `step` until it returns False.

    `add`, `Request.cancel` and `stats` may be called by any thread. A row that fails ends alone.
    Where rows cannot run in lock-step (`Runner.together`), each runs by itself, one token in turn.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        default_program: Program | None = None,
        dispatcher: Dispatcher | None = None,
        tokenizer: Any = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.runner, self.dispatcher = runner, dispatcher
        self.default_program = default_program or Program.identity(runner.depth)
        self.settings = settings or EngineSettings()
        self._text = None if tokenizer is None else StableText(tokenizer)
        self._numbers = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: list[Row] = []
        self._rows = RowRunner(runner, self.settings.kept_bytes)
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    # ------------------------------------------------------------------------------------ requests

    def add(
        self,
        prompt: Sequence[int] | Tensor,
        program: Program | None = None,
        sampling: Sampling | None = None,
        on_news: Callable[[Request], None] | None = None,
    ) -> Request:
        """A request for the continuation of `prompt`, i64[T] token ids.

        Without a program the dispatcher chooses one, or the default runs. `on_news` is called with
        the request by the engine's thread after each token and at the end, and must not block.
        Raises InputError, KvOverflowError for what can never fit, and EngineFullError.
        """
        sampling = sampling or Sampling()
        row = one_row(prompt, self.runner.info.vocab_size)
        if sampling.stop and self._text is None:
            raise InputError("stop texts need the engine's tokenizer; use stop_tokens, or pass one")
        if program is not None:
            if not isinstance(program, Program):
                raise InputError(
                    f"program must be a Program, got {program!r}; compiled.resolve makes one of a "
                    "text"
                )
            self.runner.library.check(program)
        with self._news:
            if self._closing:
                raise InputError("the engine is closed; open another")
            request = Request(
                row, program, sampling=sampling, number=next(self._numbers), on_news=on_news
            )
            self._require_room(request)
            if len(self._waiting) >= self.settings.max_waiting:
                raise EngineFullError(
                    f"{len(self._waiting)} requests wait already; try again when some are done, or "
                    "raise max_waiting"
                )
            self._waiting.append(request)
            self._news.notify()
        return request

    def _require_room(self, request: Request) -> None:
        needed = _most_tokens(request)
        most = min(self.runner.max_length, self.settings.max_tokens)
        if needed > most:
            raise KvOverflowError(
                f"a prompt of {len(request.prompt)} tokens and max_new_tokens="
                f"{request.sampling.max_new_tokens} exceed the {most} tokens that a row may hold; "
                "shorten one of them"
            )

    @property
    def is_open(self) -> bool:
        """Whether it takes requests: it was not closed, and did not stop."""
        return not self._closing

    def stats(self) -> dict[str, int]:
        """Requests that wait and run, the tokens and blocks of keys and values that are held, the
        bytes allocated for them, how many of these are kept for later requests, and how many
        tokens of prompts were found there so far.
        """
        store, pool = self.runner.lockstep.store, self.runner.pool
        with self._news:
            return {
                "waiting": len(self._waiting),
                "running": len(self._running),
                "tokens": sum(r.session.lengths[0] for r in self._running),
                "blocks": store.num_blocks,
                "bytes": store.num_bytes + pool.num_bytes,
                "kept_bytes": self._rows.kept.num_bytes,
                "found_tokens": self._rows.kept.tokens_found,
            }

    # ------------------------------------------------------------------------------------- the loop

    def __enter__(self) -> "Engine":
        self._thread = threading.Thread(target=self._loop, name="polar_fx engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all requests as cancelled, and give back what they hold."""
        with self._news:
            self._closing = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._news:
            for request in self._waiting:
                self._finish(request, "cancelled")
            self._waiting.clear()
            for row in list(self._running):
                self._end(row, "cancelled")
        self._rows.kept.clear()

    def _loop(self) -> None:
        while True:
            with self._news:
                while not (self._closing or self._waiting or self._running):
                    self._news.wait()
                if self._closing:
                    return
            try:
                self.step()
            except Exception as error:  # or whoever waits would wait for ever
                log.exception("the engine stopped")
                self._fail(error)
                return

    def _fail(self, error: BaseException) -> None:
        """End everything with an error, and take no more."""
        with self._news:
            self._closing = True
            waiting = list(self._waiting)
            self._waiting.clear()
        for request in waiting:
            request.finish(None, error)
        for row in list(self._running):
            self._end(row, error=error)
        self._rows.kept.clear()

    def step(self) -> bool:
        """Admit what has room, run a part of the prompts, and one token of each row that decodes.

        Returns whether anything is left to do.
        """
        with torch.no_grad(), without_autocast(self.runner.device):
            self._drop_cancelled()
            self._admit()
            self._prefill()
            self._decode()
        with self._news:
            return bool(self._waiting or self._running)

    def _drop_cancelled(self) -> None:
        with self._news:
            gone = [request for request in self._waiting if request.is_cancelled]
            for request in gone:
                self._waiting.remove(request)
        for request in gone:
            self._finish(request, "cancelled")
        for row in [row for row in self._running if row.request.is_cancelled]:
            self._end(row, "cancelled")

    def _admit(self) -> None:
        """Take requests in their order, as long as there is room for the next one; where prompts
        run as a whole, of those whose program is to be chosen one at a time, as that runs one.
        """
        admitted = []
        with self._news:
            held = sum(_most_tokens(row.request) for row in self._running)
            while self._waiting:
                held += _most_tokens(self._waiting[0])
                rows = len(self._running) + len(admitted)
                if rows >= self.settings.max_rows or held > self.settings.max_tokens:
                    break
                admitted.append(self._waiting.popleft())
                if self._is_chosen(admitted[-1]) and not self._rows.in_chunks:
                    break
        for request in admitted:
            try:
                row = self._opened(request)
                with self._news:
                    self._running.append(row)
            except Exception as error:  # whatever it is, the other rows go on
                log.exception("request %d could not be started", request.number)
                request.finish(None, error)

    def _is_chosen(self, request: Request) -> bool:
        """Whether the dispatcher looks at the prompt to choose its program."""
        by = self.dispatcher
        return request.program is None and by is not None and by.needs_trunk

    def _opened(self, request: Request) -> Row:
        """A row that has what is kept of its prompt."""
        dispatcher = self.dispatcher
        if dispatcher is not None and self._is_chosen(request):
            return self._rows.open_chosen(request, dispatcher)
        if request.program is None:
            fixed = self.default_program
            if dispatcher is not None:
                fixed = dispatcher.decide([torch.empty(0)])[0].program
            request.program = fixed
        return self._rows.open(request, request.program)

    def _prefill(self) -> None:
        """Run the next part of the prompts, those that came first before others."""
        if parts := self._next_parts():
            for rows, logits in self._rows.prefill(parts):
                self._take(rows, logits)

    def _next_parts(self) -> list[tuple[Row, int]]:
        """Whose prompt runs next, and how many tokens of it."""
        left = self.settings.prefill_tokens
        parts: list[tuple[Row, int]] = []
        for row in self._running:
            if row.is_prefilled:
                continue
            if not self._rows.in_chunks:
                return [(row, row.tokens_left)]
            if parts and self.runner.deterministic:
                break  # where a prompt is cut must not depend on others
            # a pass is as wide as its longest part: at least half of it should be tokens
            own = min(row.tokens_left, left // (len(parts) + 1))
            width = max(own, *(count for _, count in parts), 1)
            padded = width * (len(parts) + 1)
            fits = padded <= left and 2 * (own + sum(count for _, count in parts)) >= padded
            if not parts or (fits and row.joins(parts[0][0])):
                parts.append((row, own))
        return parts

    def _decode(self) -> None:
        """One more token of each row whose prompt is there."""
        rows = [row for row in self._running if row.is_prefilled]
        for row in rows:
            row.request.rows = max(row.request.rows, len(rows))
        for ran, logits in self._rows.decode(rows):
            self._take(ran, logits)

    # ---------------------------------------------------------------------------- what came of them

    def _take(self, rows: Sequence[Row], logits: Tensor | Exception | None) -> None:
        """The next token of each row whose prompt is there, of logits [B, V]; or the end of all, if
        their pass failed.
        """
        if isinstance(logits, Exception):
            for row in rows:
                self._end(row, error=logits)
        elif logits is not None:
            highest, best = logits.max(-1)  # NaN, if one is among them
            likeliest = zip(rows, best.tolist(), highest.isfinite().tolist(), strict=True)
            for i, (row, token, finite) in enumerate(likeliest):
                if row.is_prefilled:
                    sure = token if finite and row.request.sampler.is_argmax else None
                    self._sample(row, logits[i], sure=sure)

    def _sample(self, row: Row, logits: Tensor, *, sure: int | None = None) -> None:
        """The next token of a row, and whether it was the last one; `sure` needs no scores."""
        request, how = row.request, row.request.sampling
        try:
            token = request.sampler.choose(logits, request.tokens) if sure is None else sure
            request.say(token)
            if token in how.stop_tokens or self._stopped_at(request) is not None:
                self._end(row, "stop")
            elif len(request.tokens) >= how.max_new_tokens:
                self._end(row, "length")
        except Exception as error:  # such as a processor's own: the other rows go on
            self._end(row, error=error)

    def _stopped_at(self, request: Request) -> int | None:
        """Where in its text the first stop text begins."""
        if not request.sampling.stop or self._text is None:
            return None
        return first_stop(self._text.whole(request.tokens), request.sampling.stop)

    def _end(
        self, row: Row, finish: Finish = "stop", *, error: BaseException | None = None
    ) -> None:
        with self._news:
            self._running.remove(row)
        if error is None:
            self._rows.keep(row)
        row.close()
        if error is not None:
            row.request.finish(None, error)
        else:
            self._finish(row.request, finish)

    def _finish(self, request: Request, finish: Finish) -> None:
        """Say what came of it; of a text that cannot be decoded, that error."""
        try:
            program = request.program or self.default_program
            request.finish(self._generated(request, finish, program=program))
        except Exception as error:
            request.finish(None, error)

    def _generated(self, request: Request, finish: Finish, *, program: Program) -> Generated:
        text = None
        if self._text is not None:
            ended = request.tokens and request.tokens[-1] in request.sampling.stop_tokens
            text = self._text.whole(request.tokens[:-1] if ended else request.tokens)
            text = text[: self._stopped_at(request)]
        return Generated(
            tuple(request.tokens),
            text,
            finish,
            program,
            request.probability,
            request.rows,
            request.seconds_to_first,
            request.seconds,
        )


def _most_tokens(request: Request) -> int:
    """Tokens that a row may come to hold; the last new one is never fed back."""
    return len(request.prompt) + request.sampling.max_new_tokens - 1

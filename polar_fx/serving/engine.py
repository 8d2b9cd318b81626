"""Runs what clients ask on a bundle: prompts that wait together run as one batch a program.

Plain Python, without a server. Shape legend: B batch, T tokens.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ..bundle import BundledModel
from ..engine.stable_text import StableText
from ..errors import ProgramError
from ..output.plain_text import count
from ..program import Program
from ..runtime.generator import padded_rows
from .answers import Reply
from .measures import Measures
from .requests import Chat, Completion, Message, RequestError, Settings

log = logging.getLogger("polar_fx.serving")

_NEW_TOKENS = 16  # what OpenAI's completions default to
# what the API asks for, whatever the bundle's defaults are; texts that stop are watched here
_ONE_ANSWER: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "stop_strings": None}


@dataclass(eq=False)
class Ask:
    """One prompt with its settings, checked.

    `program` None leaves the choice to the dispatcher. `told`, if set, is called by the thread that
    runs it, at each token, with as much of the text as will not change any more. `dropped` ends it
    early.
    """

    ids: list[int]
    program: Program | None
    new_tokens: int
    temperature: float
    top_p: float
    stops: tuple[str, ...]
    seed: int | None
    told: Callable[[str], Any] | None = None
    dropped: bool = False
    probability: float | None = None

    def can_join(self, others: Sequence["Ask"], longest: int) -> bool:
        """Whether it can run beside these, in rows of `longest` tokens."""
        first = others[0]
        same = (self.program, self.temperature, self.top_p) == (
            first.program,
            first.temperature,
            first.top_p,
        )
        # samples depend on the rows beside
        seeded = self.temperature > 0 and not (self.seed is None and first.seed is None)
        rows = (*others, self)
        return same and not seeded and _row_length(rows) <= longest


class Engine:
    """Reads requests for a bundle and answers them. `answer` may be called by any thread, and runs
    one batch at a time.

    `name` is what clients call the model. Raises InputError if the bundle holds no tokenizer, or
    generation defaults by which it cannot generate.
    """

    def __init__(self, bundle: BundledModel, name: str, measures: Measures | None = None) -> None:
        self.bundle, self.name, self.tokenizer = bundle, name, bundle.tokenizer
        self.measures = measures or Measures()
        bundle.generator.check(torch.zeros(1, 1, dtype=torch.long), **_ONE_ANSWER, max_new_tokens=1)
        # the KV pool could be shared, but not the random state, nor the processors with profit
        self._lock = threading.Lock()

    # -------------------------------------------------------------------------------------- reading

    def read(self, asked: Completion | Chat) -> list[Ask]:
        """The prompts of a request. Raises RequestError before anything runs."""
        if asked.model != self.name:
            what = f"model {asked.model!r} is not served here; use {self.name!r}"
            raise RequestError(what, "model", "model_not_found", status=404)
        if isinstance(asked, Completion):
            if asked.stream and len(asked.prompts) > 1:
                raise RequestError(
                    "stream is for one prompt; send several without it",
                    "stream",
                    "unsupported_value",
                )
            new = asked.max_tokens or _NEW_TOKENS
            return [
                self._ask(asked, self._encoded(prompt), new, "prompt") for prompt in asked.prompts
            ]
        ids = self._templated(asked)
        new = (
            asked.max_completion_tokens
            or asked.max_tokens
            or max(1, self.bundle.pool.max_length + 1 - len(ids))
        )
        return [self._ask(asked, ids, new, "messages")]

    def _ask(self, asked: Settings, ids: list[int], new_tokens: int, field: str) -> Ask:
        if not ids:
            raise RequestError(f"{field} is empty; a prompt needs at least one token", field)
        if min(ids) < 0 or max(ids) >= self.bundle.vocab_size:
            raise RequestError(
                f"{field} holds a token id outside 0..{self.bundle.vocab_size - 1}", field
            )
        ask = Ask(
            ids,
            self._program(asked),
            new_tokens,
            asked.temperature,
            asked.top_p,
            asked.stops,
            asked.seed,
        )
        longest = self.bundle.pool.max_length
        if _row_length([ask]) > longest:
            raise RequestError(
                f"{field} of {count(len(ids), 'token')} and max_tokens={new_tokens} exceed the "
                f"{longest} tokens that a row of this bundle holds; shorten one of them",
                field,
                "context_length_exceeded",
            )
        return ask

    def _program(self, asked: Settings) -> Program | None:
        if asked.program is None:
            return None if self.bundle.dispatcher is not None else self.bundle.default_program
        try:
            return self.bundle.resolve(asked.program)
        except ProgramError as error:
            known = ", ".join(repr(str(p)) for p in self.bundle.programs[:20])
            more = len(self.bundle.programs) - 20
            raise RequestError(
                f"program {asked.program[:200]!r} is not served; use one of "
                f"{known}{f' and {more} more' if more > 0 else ''}",
                "program",
                "unknown_program",
            ) from error

    def _encoded(self, prompt: str | list[int]) -> list[int]:
        return prompt if isinstance(prompt, list) else list(self.tokenizer(prompt).input_ids)

    def _templated(self, asked: Chat) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            what = "the tokenizer of this bundle has no chat template; use /v1/completions"
            raise RequestError(what, "messages", "no_chat_template")
        from jinja2 import TemplateError

        said = [_turn(message) for message in asked.messages]
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    said, add_generation_prompt=True, return_dict=True
                )["input_ids"]
            )
        except TemplateError as error:  # templates refuse some orders of roles
            raise RequestError(
                f"messages do not fit the model's chat template: {error}", "messages"
            ) from error

    # ------------------------------------------------------------------------------------ answering

    def answer(self, asks: Sequence[Ask]) -> list[Reply | RequestError]:
        """An answer each, in order; an error instead for those whose batch failed."""
        found: dict[int, Reply | RequestError] = {}
        device = self.bundle.device
        gpus = [device.index or 0] if device.type == "cuda" else []
        with self._lock, torch.random.fork_rng(devices=gpus):  # a request's seed is nobody else's
            self._choose([ask for ask in asks if ask.program is None])
            for batch in self._batches(asks):
                try:
                    found.update(zip(map(id, batch), self._run(batch), strict=True))
                except Exception as error:  # whatever it is, the other batches go on
                    log.exception("a batch of %s failed", count(len(batch), "prompt"))
                    failure = RequestError(f"generation failed: {type(error).__name__}", status=500)
                    found.update((id(ask), failure) for ask in batch)
        return [found[id(ask)] for ask in asks]

    def _choose(self, asks: list[Ask]) -> None:
        """Name the program of each, by the dispatcher."""
        if not asks or self.bundle.dispatcher is None:
            return
        for ask, decision in zip(
            asks, self.bundle.dispatcher.choose(*padded_rows([a.ids for a in asks])), strict=True
        ):
            ask.program, ask.probability = decision.program, decision.probability

    def _batches(self, asks: Sequence[Ask]) -> list[list[Ask]]:
        batches: list[list[Ask]] = []
        for ask in asks:
            if (
                batch := next(
                    (b for b in batches if ask.can_join(b, self.bundle.pool.max_length)), None
                )
            ) is None:
                batches.append([ask])
            else:
                batch.append(ask)
        return batches

    def _run(self, batch: list[Ask]) -> list[Reply]:
        first, program = batch[0], self.bundle.resolve(batch[0].program)
        start = time.perf_counter()
        settings = self.bundle.generator.config()
        fill = self.bundle.generator.pad_token()
        ids, mask = padded_rows([a.ids for a in batch], fill)
        ends = (
            settings.eos_token_id
            if isinstance(settings.eos_token_id, list)
            else [settings.eos_token_id]
        )
        stops = settings.stop_strings or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        watch = _Watch(batch, ids.shape[1], frozenset(ends), self.tokenizer, stops)
        how: dict[str, Any] = {"do_sample": False}
        if first.temperature > 0:
            how = {
                "do_sample": True,
                "temperature": first.temperature,
                "top_p": first.top_p,
                "top_k": 0,
            }
            _ = torch.seed() if first.seed is None else torch.manual_seed(first.seed)
        self.bundle.generate(
            ids,
            attention_mask=mask,
            program=program,
            pad_token_id=fill,
            max_new_tokens=max(a.new_tokens for a in batch),
            stopping_criteria=[watch],
            **_ONE_ANSWER,
            **how,
        )
        self._count(batch, watch, str(program), time.perf_counter() - start)
        return [
            Reply(
                text,
                "stop" if stopped else "length",
                len(ask.ids),
                used,
                str(program),
                program.num_steps,
                ask.probability,
                len(batch),
            )
            for ask, (text, used, stopped) in zip(batch, watch.results(), strict=True)
        ]

    def _count(self, batch: list[Ask], watch: "_Watch", program: str, seconds: float) -> None:
        counts = self.measures
        counts.answers.labels(program).inc(len(batch))
        counts.prompt_tokens.labels(program).inc(sum(len(a.ids) for a in batch))
        counts.new_tokens.labels(program).inc(sum(used for _, used, _ in watch.results()))
        counts.batch_rows.labels(program).observe(len(batch))
        counts.batch_seconds.labels(program).observe(seconds)


class _Watch(StoppingCriteria):
    """Ends each row of a batch by its own limit and stop texts, and keeps what it said until
    then.

    `stops` are texts that end every row.
    """

    def __init__(
        self,
        batch: list[Ask],
        width: int,
        ends: frozenset[int | None],
        tokenizer: Any,
        stops: tuple[str, ...] = (),
    ) -> None:
        self._batch, self._width, self._ends = batch, width, ends
        self._text = StableText(tokenizer)
        self._stops = [(*ask.stops, *stops) for ask in batch]
        self._results: list[tuple[str, int, bool] | None] = [None] * len(batch)
        self._new: list[list[int]] = [[] for _ in batch]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, done in enumerate(self._results):
            if done is None:
                self._new[row] = input_ids[row, self._width :].tolist()
                self._results[row] = self._result(row)
        return torch.tensor([done is not None for done in self._results])

    def _result(self, row: int) -> tuple[str, int, bool] | None:
        """Text, tokens and whether it stopped by itself; None if it goes on."""
        ask, stops, new = self._batch[row], self._stops[row], self._new[row]
        ended, full = new[-1] in self._ends, ask.dropped or len(new) >= ask.new_tokens
        if not (ended or full or stops or ask.told):
            return None
        text = self._text.whole(new[:-1] if ended else new)
        cut = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)
        if cut is not None or ended:
            return text[:cut], len(new), True
        if ask.told:
            sure = self._text.known(new)
            # a stop text may have begun
            ask.told(sure[: max(0, len(sure) - max(map(len, stops), default=1) + 1)])
        return (text, len(new), False) if full else None

    def results(self) -> list[tuple[str, int, bool]]:
        """A result a row, when generation is over; rows that go on were ended by the time that
        generation may take.
        """
        return [
            result or (self._text.whole(new), len(new), False)
            for result, new in zip(self._results, self._new, strict=True)
        ]


def _turn(message: Message) -> dict[str, str]:
    """A message as chat templates take it."""
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": message.text, **named}


def _row_length(asks: Sequence[Ask]) -> int:
    """Tokens that a row must hold if these run together; the last new one is never fed back."""
    return max(len(a.ids) for a in asks) + max(a.new_tokens for a in asks) - 1

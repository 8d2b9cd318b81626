"""Reads what clients ask, and runs it on an engine: prompts that come meanwhile join between two
tokens, whatever their programs.

Plain Python, without a server.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..bundle import BundledModel
from ..engine import EngineSettings, Generated, Request, Sampling
from ..engine.defaults import sampling_by_defaults
from ..engine.stable_text import StableText, first_stop
from ..errors import EngineFullError, InputError, ProgramError
from ..output.plain_text import count
from ..program import Program
from .answers import Reply
from .measures import Measures
from .requests import Chat, Completion, Message, RequestError, Settings

log = logging.getLogger("polar_fx.serving")

_NEW_TOKENS = 16  # what OpenAI's completions default to
# what the API asks for, whatever the bundle's defaults are
_ONE_ANSWER: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "stop_strings": None}


@dataclass(frozen=True)
class Ask:
    """One prompt with its settings, checked. `program` None leaves the choice to the dispatcher."""

    ids: list[int]
    program: Program | None
    sampling: Sampling


class Service:
    """Reads requests for a bundle and answers them. A context manager that runs them in a thread;
    any thread may add some.

    `name` is what clients call the model; `settings` are those of EngineSettings. Raises InputError
    if the bundle holds no tokenizer, or generation defaults by which it cannot generate.
    """

    def __init__(
        self,
        bundle: BundledModel,
        name: str,
        *,
        measures: Measures | None = None,
        **settings: int,
    ) -> None:
        self.bundle, self.name, self.tokenizer = bundle, name, bundle.tokenizer
        self.measures = measures or Measures()
        bundle.generator.check(torch.zeros(1, 1, dtype=torch.long), **_ONE_ANSWER, max_new_tokens=1)
        tokens = max(EngineSettings.max_tokens, bundle.runner.max_length)
        self.engine = bundle.engine(tokenizer=self.tokenizer, **{"max_tokens": tokens, **settings})
        self._text = StableText(self.tokenizer)

    def __enter__(self) -> "Service":
        self.engine.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.close()

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
                self._ask(asked, self._encoded(prompt), new_tokens=new, field="prompt")
                for prompt in asked.prompts
            ]
        ids = self._templated(asked)
        new = (
            asked.max_completion_tokens
            or asked.max_tokens
            or max(1, self.bundle.pool.max_length + 1 - len(ids))
        )
        return [self._ask(asked, ids, new_tokens=new, field="messages")]

    def _ask(self, asked: Settings, ids: list[int], *, new_tokens: int, field: str) -> Ask:
        if not ids:
            raise RequestError(f"{field} is empty; a prompt needs at least one token", field)
        if min(ids) < 0 or max(ids) >= self.bundle.vocab_size:
            raise RequestError(
                f"{field} holds a token id outside 0..{self.bundle.vocab_size - 1}", field
            )
        program, stops = self._program(asked), asked.stops
        longest = self.bundle.pool.max_length
        if len(ids) + new_tokens - 1 > longest:  # the last one is never fed back
            raise RequestError(
                f"{field} of {count(len(ids), 'token')} and max_tokens={new_tokens} exceed the "
                f"{longest} tokens that a row of this bundle holds; shorten one of them",
                field,
                "context_length_exceeded",
            )
        sampling = sampling_by_defaults(
            self.bundle.generator,
            ids,
            max_new_tokens=new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            stop=stops,
            seed=asked.seed,
        )
        return Ask(ids, program, sampling)

    def _program(self, asked: Settings) -> Program | None:
        if asked.program is None:
            return None
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

    def add(self, ask: Ask, on_news: Callable[[Request], None] | None = None) -> Request:
        """Let the engine run it; `on_news` is called by the engine's thread after each token and at
        the end, and must not block.

        Raises RequestError.
        """
        try:
            return self.engine.add(ask.ids, ask.program, ask.sampling, on_news)
        except EngineFullError as error:
            raise RequestError(str(error), code="overloaded", status=503) from error
        except InputError as error:  # it stopped
            raise RequestError(str(error), status=500) from error

    def answer(self, asks: Sequence[Ask]) -> list[Reply | RequestError]:
        """An answer each, in order, and an error instead for those that failed; for use without a
        thread, where it runs what waits to its end.
        """
        running = [self.add(ask) for ask in asks]
        while self.engine.step():
            pass
        found: list[Reply | RequestError] = []
        for request in running:
            try:
                found.append(self.reply(request))
            except RequestError as error:
                found.append(error)
        return found

    def reply(self, request: Request) -> Reply:
        """The answer of a request that is done. Raises RequestError if it failed."""
        try:
            found = request.result(0)
        except Exception as error:
            log.error("request %d failed", request.number, exc_info=error)
            what = f"generation failed: {type(error).__name__}"
            raise RequestError(what, status=500) from error
        self._count(request, found)
        return Reply(
            found.text or "",
            "stop" if found.finish == "stop" else "length",
            len(request.prompt),
            len(found.tokens),
            str(found.program),
            found.program.num_steps,
            found.probability,
            found.rows,
        )

    def known_text(self, request: Request, num_tokens: int | None = None) -> str:
        """As much of the answer's first tokens, or of all so far, as will not change any more."""
        text = self._text.known(request.tokens[:num_tokens])
        if (end := first_stop(text, stops := request.sampling.stop)) is None:
            # one may have begun
            end = max(0, len(text) - max(map(len, stops), default=1) + 1)
        return text[:end]

    def _count(self, request: Request, found: Generated) -> None:
        counts, program = self.measures, str(found.program)
        counts.answers.labels(program).inc()
        counts.prompt_tokens.labels(program).inc(len(request.prompt))
        counts.new_tokens.labels(program).inc(len(found.tokens))
        counts.batch_rows.labels(program).observe(found.rows)
        counts.first_token_seconds.labels(program).observe(found.seconds_to_first)
        counts.answer_seconds.labels(program).observe(found.seconds)


def _turn(message: Message) -> dict[str, str]:
    """A message as chat templates take it."""
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": message.text, **named}

"""Responses in the form of OpenAI's API, with `polar_fx` beside each choice: what ran."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Reply:
    """What became of one prompt.

    `probability` is the predicted one that the program answers right, None if none was predicted.
    `rows` is how many prompts ran in its batch. `reason` is "stop" at an end-of-text token or a
    stop text, else "length".
    """

    text: str
    reason: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int
    program: str
    steps: int
    probability: float | None
    rows: int


@dataclass(frozen=True)
class Form:
    """How a route says an answer: whole, and part by part."""

    prefix: str
    whole: str
    part: str
    is_chat: bool

    def response(self, model: str, answers: Sequence[Reply]) -> dict[str, Any]:
        """An answer a choice, whole."""
        said = [self._said(a.text, "message") for a in answers]
        choices = [
            _choice(i, what, answer=a)
            for i, (a, what) in enumerate(zip(answers, said, strict=True))
        ]
        return {**self.head(model, self.whole), "choices": choices, "usage": _usage(answers)}

    def head(self, model: str, kind: str | None = None) -> dict[str, Any]:
        """What all parts of one streamed answer have in common."""
        name, now = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        return {"id": name, "object": kind or self.part, "created": now, "model": model}

    def event(
        self, head: dict[str, Any], text: str, *, answer: Reply | None = None
    ) -> dict[str, Any]:
        """Some more text; with `answer` the last, which tells how it ended."""
        return {**head, "choices": [_choice(0, self._said(text, "delta"), answer=answer)]}

    def _said(self, text: str, key: str) -> dict[str, Any]:
        return {key: {"role": "assistant", "content": text}} if self.is_chat else {"text": text}


COMPLETION = Form("cmpl", "text_completion", "text_completion", False)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", True)


def usage_event(head: dict[str, Any], answer: Reply) -> dict[str, Any]:
    """The tokens used, after the last part."""
    return {**head, "choices": [], "usage": _usage([answer])}


def models(name: str, created: int, **about: Any) -> dict[str, Any]:
    """Response of /v1/models."""
    model = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "polar_fx",
        "polar_fx": about,
    }
    return {"object": "list", "data": [model]}


def _choice(index: int, said: dict[str, Any], *, answer: Reply | None) -> dict[str, Any]:
    choice = {"index": index, **said, "finish_reason": answer and answer.reason, "logprobs": None}
    if answer is not None:
        ran = {
            "program": answer.program,
            "steps": answer.steps,
            "probability": answer.probability,
            "rows": answer.rows,
        }
        choice["polar_fx"] = ran
    return choice


def _usage(answers: Sequence[Reply]) -> dict[str, int]:
    prompt = sum(answer.prompt_tokens for answer in answers)
    new = sum(answer.new_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

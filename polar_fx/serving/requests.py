"""What a client asks: bodies in the form of OpenAI's API, read and refused in its words."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..errors import PolarError
from ..output.plain_text import size

MAX_BODY_BYTES = 4 << 20
MAX_PROMPTS = 64

_Ids = Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]
_Off = Annotated[float, Field(ge=0, le=0)]
_One = Annotated[int, Field(ge=1, le=1)]


def _only(*neutral: Any) -> AfterValidator:
    """Lets values pass that ask for nothing; 0 is no False here, as it is none in the API."""

    def check(value: Any) -> Any:
        if not any(value == n and type(value) is type(n) for n in neutral):
            shown = " or ".join(map(json.dumps, (*neutral, None)))
            raise PydanticCustomError("not_served", "only {shown} is served", {"shown": shown})
        return value

    return AfterValidator(check)


def _without_effect(biases: dict[str, float]) -> dict[str, float]:
    if any(biases.values()):
        raise PydanticCustomError("not_served", "only biases of 0 are served")
    return biases


_No = Annotated[Any, _only(False)]
_Nothing = Annotated[Any, _only([])]  # a list of things that may be used: none
_Told = Annotated[str, Field(max_length=4096)]  # what only a hosted service makes use of

Body = TypeVar("Body", bound="Settings")


class RequestError(PolarError, ValueError):
    """A request that is refused: HTTP status, message, and OpenAI's `param` and `code` where there
    are any.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message, param, code, status)
        self.message, self.param, self.code, self.status = message, param, code, status

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """In OpenAI's error shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }


class _Fields(BaseModel):
    """Known fields alone, of which null is as good as left out."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if v is not None or k not in cls.model_fields}


class StreamOptions(_Fields):
    """Whether the tokens used are told in a last event."""

    include_usage: bool = False
    include_obfuscation: _No = None


class Settings(_Fields):
    """What both routes take.

    Fields that are not served are there with the values that ask for nothing. Every field that is
    not required may be null.
    """

    model: str
    program: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] | None = Field(None, max_length=256)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # for abuse reports of a hosted service; changes nothing
    n: _One | None = None
    logprobs: _No = None
    frequency_penalty: _Off | None = None
    presence_penalty: _Off | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_without_effect)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer; empty ones would end it before it began."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in found or len(found) > 4:
            raise RequestError("stop takes up to 4 texts, none of them empty", "stop")
        return found


class Completion(Settings):
    """Body of POST /v1/completions: text or token ids to go on from, or several of them."""

    prompt: str | _Ids | Annotated[list[str | _Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    best_of: _One | None = None
    echo: _No = None
    suffix: Annotated[Any, _only("")] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class ContentPart(BaseModel):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(_Fields):
    """One turn of a conversation, which may be an earlier answer as the client got it."""

    role: Literal["system", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None
    refusal: Annotated[Any, _only("")] = None
    audio: Annotated[Any, _only()] = None
    annotations: _Nothing = None
    tool_calls: _Nothing = None
    function_call: Annotated[Any, _only()] = None

    @property
    def text(self) -> str:
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )


class Chat(Settings):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    top_logprobs: Annotated[Any, _only(0)] = None
    tools: _Nothing = None
    functions: _Nothing = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None  # of no tools, both choose none
    function_call: Annotated[Any, _only("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Annotated[Any, _only()] = None
    prediction: Annotated[Any, _only()] = None
    moderation: Annotated[Any, _only()] = None
    web_search_options: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    verbosity: Annotated[Any, _only("medium")] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    store: _No = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    safety_identifier: _Told | None = None
    prompt_cache_key: _Told | None = None
    prompt_cache_retention: _Told | None = None
    prompt_cache_options: Annotated[Any, _only({})] = None


def read(kind: type[Body], body: bytes) -> Body:
    """The request in a body.

    Raises RequestError naming the first field that is wrong, and what it holds.
    """
    if len(body) > MAX_BODY_BYTES:
        raise RequestError(
            f"the body has {size(len(body))}; send at most {size(MAX_BODY_BYTES)}", status=413
        )
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(kind.model_fields))
            raise RequestError(
                f"{field} is not served; leave it out. Known are {known}",
                field,
                "unknown_parameter",
            ) from error
        shown = (
            ""
            if first["type"] in ("missing", "json_invalid")
            else f", got {repr(first['input'])[:80]}"
        )
        raise RequestError(
            f"{field or 'the body'}: {first['msg']}{shown}", field or None
        ) from error
    return asked

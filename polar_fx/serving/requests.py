"""What a client asks: bodies in the form of OpenAI's API, read and refused in its words."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import PolarError
from ..output.plain_text import size

MAX_BODY_BYTES = 4 << 20
MAX_PROMPTS = 64

_Ids = Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]
_Off = Annotated[float, Field(ge=0, le=0)]
_One = Annotated[int, Field(ge=1, le=1)]

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


class StreamOptions(BaseModel):
    """Whether the tokens used are told in a last event."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Settings(BaseModel):
    """What both routes take.

    Fields that are not served are there with the one value that asks for nothing.
    """

    model_config = ConfigDict(extra="forbid")

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
    logprobs: Literal[False] | None = None
    frequency_penalty: _Off | None = None
    presence_penalty: _Off | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

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
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class Part(BaseModel):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

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
    top_logprobs: None = None
    tools: None = None
    response_format: None = None


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

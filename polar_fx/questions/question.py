"""Questions, as text and as tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a task. `answers` are the accepted final answers as text, the preferred one first.

    `difficulty` is 1 (easiest) to 5, None where it was not measured; `cell` names the kind of
    question within its task, such as "2x1 digits": rows of one cell share a measured base accuracy.
    """

    id: str
    task: str
    question: str
    answers: tuple[str, ...]
    difficulty: int | None = None
    cell: str = ""


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """A question under a prompt, as token ids.

    The prompt is `prefix + prompt`: `prefix` is what all questions of a task begin with
    (instructions, examples; it may be empty), `prompt` this question's own part. `targets` are the
    continuations that count as right when greedy decoding gives exactly one of them: answer, then
    stop token. None is empty.
    """

    id: str
    prefix: tuple[int, ...]
    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

"""Prompts: how a question becomes tokens, and which tokens are a right answer.

The built-in ones are in `templates.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..errors import InputError
from .question import EncodedQuestion, Question

# Deliberately dissimilar probes: whatever prefix their prompts share, every prompt of the template
# shares.
_PROBES = ("7", "x", "Q", "(", "-", "$", "\\frac", "é", "\u4e00")


@dataclass(frozen=True, slots=True)
class DecodeStop:
    """Where generation under a prompt ends: after one of `token_ids`, at one of `strings`, or after
    `max_new_tokens`.
    """

    token_ids: tuple[int, ...]
    strings: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class PromptTemplate:
    """A way to ask. Change `version` with any change of the others: results are kept under name and
    version.

    `prompt` is the text, with `{question}` where the question goes; `answer` is how a right
    continuation reads, with `{answer}` in it; `stop` is the text that ends it. An empty `stop` is
    the end of the turn, or of the text. With `chat`, `prompt` is what the user says in the
    tokenizer's chat template, where it has one. Raises InputError on a bad field.
    """

    name: str
    version: int
    prompt: str
    answer: str = " {answer}"
    stop: str = "\n"
    chat: bool = False
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        for field, mark in (("prompt", "{question}"), ("answer", "{answer}")):
            if (count := getattr(self, field).count(mark)) != 1:
                raise InputError(
                    f"{field} of the prompt template {self.name!r} holds {mark} {count} times; "
                    "write it once"
                )
        for field in ("version", "max_new_tokens"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(
                    f"{field} of the prompt template {self.name!r} is {value!r}; give a whole "
                    "number from 1"
                )

    @property
    def key(self) -> str:
        """Name and version, such as `direct@1`."""
        return f"{self.name}@{self.version}"

    def text(self, tokenizer: Any, question: str) -> str:
        """The whole prompt for a question's text, whose white space at both ends does not count."""
        text = self.prompt.replace("{question}", question.strip())
        if not self._in_chat(tokenizer):
            return text + "\n" if self.chat else text  # where the user's turn would end
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )

    def encode(self, tokenizer: Any, question: Question) -> EncodedQuestion:
        """A question as token ids; see `encode_all`."""
        return self.encode_all(tokenizer, [question])[0]

    def encode_all(self, tokenizer: Any, questions: Iterable[Question]) -> list[EncodedQuestion]:
        """Questions as token ids; all have one prefix.

        A target is what the tokenizer makes of prompt, answer and stop together, behind the
        prompt's own tokens. Raises InputError where that is not defined: the tokenizer merges the
        prompt's end with the answer, or begins a prompt otherwise than those of other questions.
        """
        prefix = self._prefix(tokenizer)
        return [self._encode(tokenizer, question, prefix=prefix) for question in questions]

    def decode_stop(self, tokenizer: Any) -> DecodeStop:
        """What `generate` needs to end where a target ends."""
        if self.stop:
            eos = tokenizer.eos_token_id
            return DecodeStop(() if eos is None else (eos,), (self.stop,), self.max_new_tokens)
        end = self._end(tokenizer)
        # a chat's turn may end otherwise than its text
        ids = dict.fromkeys((end, tokenizer.eos_token_id))
        return DecodeStop(tuple(i for i in ids if i is not None), (), self.max_new_tokens)

    def _in_chat(self, tokenizer: Any) -> bool:
        return self.chat and bool(getattr(tokenizer, "chat_template", None))

    def _tokens(self, tokenizer: Any, text: str) -> tuple[int, ...]:
        # a chat template writes the special tokens itself
        return tuple(tokenizer(text, add_special_tokens=not self._in_chat(tokenizer)).input_ids)

    def _prefix(self, tokenizer: Any) -> tuple[int, ...]:
        probes = [self._tokens(tokenizer, self.text(tokenizer, probe)) for probe in _PROBES]
        same = takewhile(lambda ids: len(set(ids)) == 1, zip(*probes, strict=False))
        return tuple(ids[0] for ids in same)

    def _encode(
        self, tokenizer: Any, question: Question, *, prefix: tuple[int, ...]
    ) -> EncodedQuestion:
        text = self.text(tokenizer, question.question)
        tokens = self._tokens(tokenizer, text)
        where = f"prompt template {self.key}, question {question.id!r}: "
        if tokens[: len(prefix)] != prefix:
            raise InputError(
                f"{where}the tokenizer begins this prompt otherwise than those of other questions; "
                "end the text before {question} with a line break"
            )
        if len(tokens) == len(prefix):
            raise InputError(f"{where}the question has no tokens of its own; give it a text")
        end = () if self.stop else (self._end(tokenizer),)
        targets = []
        for answer in dict.fromkeys(question.answers):
            whole = (
                self._tokens(tokenizer, text + self.answer.replace("{answer}", answer) + self.stop)
                + end
            )
            if whole[: len(tokens)] != tokens:
                raise InputError(
                    f"{where}the tokenizer merges the end of the prompt with the answer "
                    f"{answer!r}; move white space between `prompt` and `answer` of the template"
                )
            targets.append(whole[len(tokens) :])
        if not targets:
            raise InputError(f"{where}it has no accepted answer; give at least one")
        return EncodedQuestion(question.id, prefix, tokens[len(prefix) :], tuple(targets))

    def _end(self, tokenizer: Any) -> int:
        """The token that ends the answer where no text does: what the chat template closes a turn
        with, else eos.
        """
        if self._in_chat(tokenizer):
            turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
            behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
            ids = tokenizer(behind.lstrip(), add_special_tokens=False).input_ids
            special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
            if ids and ids[0] in special:
                return ids[0]
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"prompt template {self.key} ends answers with the end of the text, which this "
                "tokenizer has no token for; set tokenizer.eos_token, or give the template a "
                "`stop` text"
            )
        return tokenizer.eos_token_id

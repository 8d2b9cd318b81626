"""transformers' generation loop on top of prefill and decode.

Sampling, beams, stop tokens and strings, logits processors and streamers are transformers' own;
this adapter only answers its forward calls. Its overhead per token is measured in bench/latency.py.
"""

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..capture import CACHE
from ..errors import InputError, KvOverflowError, ModelWarning
from ..program import Program
from .generation_settings import refuse_settings, setting_names, without_chunks
from .greedy import Greedy, continued, plain
from .runner import Runner, Session
from .trunk import Trunk, session_after
from .unguided import Unguided, check_guidance, check_room, default_unguided, of_rows

_UNSUPPORTED = (
    "assistant_model",
    "past_key_values",
    "cache",
    "inputs_embeds",
    "position_ids",
    "custom_generate",
)


def padded_rows(
    rows: Sequence[Sequence[int]], fill: int = 0, *, side: str = "left"
) -> tuple[Tensor, Tensor]:
    """Token rows as `generate` takes them: ids i64[B, T], padded with `fill`, and the mask i64[B,
    T] of real ones.
    """
    ids = pad_sequence(
        [torch.tensor(r) for r in rows], batch_first=True, padding_value=fill, padding_side=side
    )
    return ids, pad_sequence(
        [torch.ones(len(r), dtype=torch.long) for r in rows], batch_first=True, padding_side=side
    )


class _Running(GenerationMixin):
    """What GenerationMixin takes for a model, for the duration of one call."""

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    _is_stateful = False

    def __init__(
        self,
        runner: Runner,
        generation_config: GenerationConfig,
        *,
        prompt: "_Prompt | None" = None,
        unguided: Unguided | None = None,
    ) -> None:
        self.runner, self.prompt, self.unguided = runner, prompt, unguided
        self.config, self.generation_config = runner.info.config, generation_config
        self.device, self.dtype = runner.device, runner.dtype
        # of the tokens [B, T] that the loop holds, those that the session has seen, padding
        # included
        self._columns = 0

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def _optimize_model_for_decode(self) -> Any:
        # transformers would switch its own modules' expert kernels here
        return contextlib.nullcontext()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: cache or past_key_values,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, 1, V] of the last token; [B, n, V] of a later call that brings n > 1 new
        tokens a row.

        The loop passes either all tokens so far or, shorter than the mask, the new ones alone.
        """
        session: Session = cache or past_key_values
        if (other := self.unguided) is not None and session in (None, other.session):
            logits = other.logits(input_ids, attention_mask)
            beside: Any = {CACHE: other.session}
            return CausalLMOutputWithPast(logits=logits, **beside)  # type: ignore[arg-type]
        width = input_ids.shape[1]
        whole = attention_mask is None or attention_mask.shape[1] == width
        new = width - self._columns if whole and width > self._columns else width
        first, self._columns = self._columns == 0, self._columns + new
        if first and (held := session.get_seq_length()) > 0:  # a conversation goes on
            rows, _ = self.runner.rows(input_ids[:, held:])
            logits = torch.stack(self.runner.prefill(session, rows))[:, None]
        elif first:
            if self.prompt is not None and self.prompt.is_of(input_ids):
                rows = self.prompt.rows
            else:
                rows, _ = self.runner.rows(input_ids, attention_mask)
            logits = torch.stack(self.runner.prefill(session, rows))[:, None]
        elif new == 1:
            logits = self.runner.decode(session, input_ids[:, -1])[:, None]
        else:
            mask = None if attention_mask is None else attention_mask[:, -new:]
            rows, real = self.runner.rows(input_ids[:, -new:], mask)
            if not bool(real.all()):
                raise InputError(
                    f"{new} tokens a row follow the prompt at once, some of them padding; pass "
                    "rows of equal length"
                )
            logits = torch.stack(self.runner.prefill(session, rows, every=True))
        return CausalLMOutputWithPast(logits=logits, **{CACHE: session})  # type: ignore[arg-type]

    __call__ = forward


@dataclass(frozen=True, eq=False)
class _Prompt:
    """Prompts that were checked: ids i64[B, T] as the loop first passes them, and each row's real
    tokens.
    """

    input_ids: Tensor
    rows: list[Tensor]

    def is_of(self, input_ids: Tensor) -> bool:
        """Whether a loop, which may be a caller's own, passes these very tokens."""
        return torch.equal(self.input_ids, input_ids)


@dataclass(frozen=True, eq=False)
class Call:
    """A generate call that was checked.

    `input_ids` and `mask` i64[B, T] are on the model's device, `rows` the real tokens of each row.
    `settings` are those that it runs by, `kwargs` what is left to pass to transformers; `greedy` if
    likeliest tokens, so many at least and at most, are all that is asked for, and nothing looks at
    them meanwhile.
    """

    input_ids: Tensor
    mask: Tensor
    rows: list[Tensor]
    settings: GenerationConfig
    kwargs: dict[str, Any]
    greedy: Greedy | None

    @property
    def copies(self) -> int:
        """Rows of the session for each row of the prompt: beams or returned sequences."""
        return max(self.settings.num_beams or 1, self.settings.num_return_sequences or 1)


class Generator:
    """Checks the arguments of a generate call, opens a KV session for it and runs transformers'
    loop.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def run(
        self, call: Call, program: Program | Sequence[Program], *, trunk: Trunk | None = None
    ) -> Any:
        """What transformers' `generate` returns, on the model's device, wherever the prompts were.

        `program` is that of all rows, or one for each. After a `trunk` of these rows only the steps
        after it are prefilled.
        """
        copied = [r for r in range(len(call.rows)) for _ in range(call.copies)]
        each = [program] * len(call.rows) if isinstance(program, Program) else program
        programs = [each[r] for r in copied]
        if trunk is None:
            opened = self.runner.open_rows(programs)
        else:
            taken = trunk if call.copies == 1 else trunk.take(copied)
            opened = session_after(self.runner, programs, trunk=taken)
        prompt = _Prompt(
            call.input_ids.repeat_interleave(call.copies, 0), [call.rows[r] for r in copied]
        )
        kwargs = of_rows(call.kwargs, torch.tensor(copied)) if call.copies > 1 else call.kwargs
        with opened as session, Unguided(self.runner, programs) as unguided:
            return self.go_on(
                replace(call, kwargs=kwargs), session, prompt=prompt, unguided=unguided
            )

    def go_on(
        self,
        call: Call,
        session: Session,
        *,
        prompt: "_Prompt | None" = None,
        unguided: Unguided | None = None,
    ) -> Any:
        """The same in a session of the caller's, which may hold the first tokens of its row."""
        own = without_chunks(self._defaults)
        running: Any = _Running(self.runner, own, prompt=prompt, unguided=unguided)
        if call.greedy is not None:
            return self._greedy(running, call, asked=call.greedy, session=session)
        return running.generate(
            call.input_ids,
            attention_mask=call.mask,
            use_cache=True,
            **{CACHE: session},
            **call.kwargs,
        )

    @torch.no_grad()
    def _greedy(
        self, running: "_Running", call: Call, *, asked: Greedy, session: Session
    ) -> Tensor:
        """The same where the likeliest tokens are all that is asked for."""
        given: Any = {CACHE: session}
        logits = running.forward(call.input_ids, call.mask, **given).logits
        assert logits is not None
        new = continued(
            logits[:, -1], lambda tokens: self.runner.decode(session, tokens), asked=asked
        )
        return torch.cat((call.input_ids, new), 1)

    def check(self, input_ids: Tensor, **kwargs: Any) -> Call:
        """The call with these arguments of transformers' `generate`.

        Raises InputError for what cannot be followed, and KvOverflowError for what does not fit.
        """
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise InputError(
                    f"generate() does not take {name}: the compiled model runs transformers' own "
                    "loop over prompts of token ids and keeps its own KV cache; leave it out"
                )
        if kwargs.pop("synced_gpus", None):
            raise InputError(
                "synced_gpus=True lets rows wait for other processes, and a compiled model runs in "
                "one; leave it out"
            )
        given = kwargs.get("generation_config")
        if given is not None and not isinstance(given, GenerationConfig):
            raise InputError(
                f"generation_config must be a transformers GenerationConfig, got {given!r}"
            )
        given_mask = kwargs.pop("attention_mask", None)
        rows, mask = self.runner.rows(input_ids, given_mask)
        settings = self.config(**kwargs)
        refuse_settings(settings)
        check_guidance(self.runner, settings, kwargs=kwargs, batch=len(rows))
        if given_mask is None:
            rows, mask = self.runner.rows(input_ids, _inferred_mask(input_ids, settings))
        prompt, longest = input_ids.shape[1], max(len(r) for r in rows)
        new = self._most_new(settings, prompt, kwargs=kwargs)
        most = self.runner.max_length
        if longest + new - 1 > most:  # the last token is never fed back
            raise KvOverflowError(
                f"a prompt of {longest} tokens and max_new_tokens={new} exceed the KV pool of "
                f"{most}; shorten the prompt, lower max_new_tokens, or compile with "
                f"max_length={longest + new}"
            )
        kwargs |= default_unguided(settings, kwargs, rows=rows)
        check_room(self.runner, kwargs, new=new)
        for name in ("prefill_chunk_size", "use_cache", "cache_implementation"):
            kwargs.pop(name, None)
        if given is not None:
            kwargs["generation_config"] = without_chunks(given)
        # transformers appends what comes from the model's device to what it was given
        device = self.runner.device
        running: Any = _Running(self.runner, self._defaults)
        greedy = plain(running, settings, kwargs=kwargs)
        return Call(input_ids.to(device), mask.long().to(device), rows, settings, kwargs, greedy)

    def _most_new(self, settings: GenerationConfig, prompt: int, *, kwargs: dict[str, Any]) -> int:
        """How many tokens may follow prompts of so many, padding included: as transformers counts,
        to whom 20 is the default, as far as the model's own limit.
        """
        if settings.max_new_tokens is not None:
            return settings.max_new_tokens
        given = kwargs.get("generation_config")
        stated = (kwargs.get("max_length"), given and given.max_length, self._defaults.max_length)
        if any(length is not None for length in stated):
            return (settings.max_length or 0) - prompt
        limit = getattr(self.runner.info.config, "max_position_embeddings", None)
        return min(20, limit - prompt) if limit is not None else 20

    def pad_token(self, **kwargs: Any) -> int:
        """What a call fills shorter continuations with: the pad token, else the end of the text,
        else 0.
        """
        return pad_token(self.config(**kwargs))

    def config(self, **kwargs: Any) -> GenerationConfig:
        """The generation settings that a call with these arguments runs by."""
        running: Any = _Running(self.runner, self._defaults)
        return running._prepare_generation_config(
            kwargs.get("generation_config"), **_config_arguments(kwargs)
        )[0]

    def processors(
        self, prompt: Sequence[int], max_new_tokens: int, **kwargs: Any
    ) -> tuple[GenerationConfig, LogitsProcessorList]:
        """The settings of a call for one row of token ids, and what they do to its scores, for a
        loop of one's own: all that `generate` would, temperature and the like included.
        """
        settings = self.config(**kwargs, max_new_tokens=max_new_tokens)
        settings.max_length = len(prompt) + max_new_tokens
        running: Any = _Running(self.runner, self._defaults)
        running._prepare_special_tokens(settings, True, device="cpu")
        ids = torch.tensor([list(prompt)])
        found = running._get_logits_processor(
            settings, len(prompt), ids, device="cpu", model_kwargs={"attention_mask": None}
        )
        return settings, found

    @property
    def _defaults(self) -> GenerationConfig:
        """The model's own settings."""
        return self.runner.info.generation_config or GenerationConfig()


def pad_token(config: GenerationConfig) -> int:
    """What fills shorter continuations under these settings."""
    pad = config.pad_token_id
    return int(pad) if pad is not None else next(iter(_ends(config)), 0)


def _ends(config: GenerationConfig) -> list[int]:
    """The tokens that end a text: a number, several, or a tensor of them, as transformers takes
    them.
    """
    ends: Any = config.eos_token_id
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def _inferred_mask(input_ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """The mask [B, T] of prompts that came without one, as transformers infers it: padding is the
    pad token, unless that may as well end a text. None: nothing is padding.

    Warns (ModelWarning) of a row among several that begins or ends with a pad token that is also
    the end of the text.
    """
    ends = _ends(config)
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), None)
    if pad is None:
        return None
    is_pad = input_ids == pad
    if pad not in ends:
        # a row of pad tokens alone is a prompt all the same: there has to be one
        return (~is_pad | is_pad.all(1, keepdim=True)).long()
    if len(input_ids) > 1 and bool(is_pad[:, [0, -1]].any()):
        warnings.warn(
            f"no attention_mask was passed, and prompts begin or end with token {pad}, which both "
            "pads and ends a text: it is taken for text; pass the tokenizer's attention_mask",
            ModelWarning,
            stacklevel=4,
        )
    return None


def _config_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in setting_names()}

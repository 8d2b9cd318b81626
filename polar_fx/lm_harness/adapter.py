"""A compiled model as a model of lm-evaluation-harness; each request runs the program chosen for
its context.

The continuation that is scored takes no part in the choice. Shape legend: B batch, T tokens, V
vocabulary.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..compiled import CompiledModel, ProgramLike, compile
from ..environment import install_command
from ..errors import InputError
from ..judge.early_exit import EarlyExits
from ..models import load
from ..program import Program
from ..runtime.dispatcher import Decision, Dispatcher
from ..runtime.generator import padded_rows
from .choice_exits import ChoiceExits
from .programs_used import ProgramsUsed
from .requests import Asked, StopStrings, new_text

try:
    import lm_eval.models  # pyright: ignore[reportMissingImports]  # noqa: F401  (else the registry would hold this one alone)
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm
except ImportError as error:
    raise InputError(
        f"evaluating with lm-eval needs it installed ({error}); {install_command('harness')}"
    ) from error

log = logging.getLogger("polar_fx.harness")

T = TypeVar("T")
Tokens = tuple[int, ...]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@register_model("polar_fx")
class PolarLM(TemplateLM):
    """A compiled model that lm-eval evaluates.

    Args:
        pretrained: a folder or model id, None for the embedded default; or a `CompiledModel`, with
            its `tokenizer`.
        dtype, quantize, backend, max_length, predictor, policy: as `polar_fx.compile` takes them;
            not with a `CompiledModel`.
        program: what every request runs; with a predictor or policy, requests are dispatched
            instead.
        exits: `EarlyExits`, or the file that `python -m polar_fx exits` wrote; see `ChoiceExits`.
        batch_size: rows that run at once, all by one program.
        max_gen_toks: new tokens of a request that names no number.
        device: where the model goes; a GPU that is not there leaves it on the CPU, as in lm-eval.
        max_batch_size: not used; lm-eval hands it over.

    A dispatcher's menu is prepared here if it was not. `report()` says which programs ran. Raises
    InputError, and what `polar_fx.load` and `polar_fx.compile` raise.
    """

    def __init__(
        self,
        pretrained: str | CompiledModel | None = None,
        tokenizer: Any = None,
        *,
        dtype: str | None = None,
        quantize: str | None = None,
        backend: str | None = None,
        max_length: int | None = None,
        predictor: str | None = None,
        policy: str | None = None,
        program: ProgramLike = None,
        exits: EarlyExits | str | None = None,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.max_gen_toks = (
            _count("batch_size", batch_size),
            _count("max_gen_toks", max_gen_toks),
        )
        dispatched = predictor is not None or policy is not None
        if (program is not None) + dispatched + (exits is not None) > 1:
            raise InputError(
                f"program={program!r}, a predictor or policy, and exits exclude each other; leave "
                "all but one of them off"
            )
        options = {
            "dtype": dtype,
            "quantize": quantize,
            "backend": backend,
            "max_length": max_length,
            "predictor": predictor,
            "policy": policy,
            "device": device,
        }
        if isinstance(pretrained, CompiledModel):
            _check_compiled_already(options, tokenizer)
            self.compiled = pretrained
        else:
            self.compiled, own = _compiled(pretrained, options)
            tokenizer = own if tokenizer is None else tokenizer
        self.tokenizer = tokenizer
        self.program = None if program is None else self.compiled.resolve(program)
        self.exits = None if exits is None else ChoiceExits(self.compiled, exits)
        self.used = ProgramsUsed()
        self._decisions: list[Decision] = []  # of the last requests that were scored
        dispatcher = self._dispatcher
        if (
            dispatcher
            and dispatcher.unprepared == "identity"
            and set(dispatcher.menu.programs) - dispatcher.prepared
        ):
            self.compiled.warmup()

    # -------------------------------------------------------------------- what lm-eval asks a model

    @property
    def device(self) -> torch.device:
        return self.compiled.device

    @property
    def max_length(self) -> int:
        return self.compiled.pool.max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a continuation without context is conditioned on.

        Raises InputError if the tokenizer has nothing for it.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise InputError(
            "an empty context needs a first token, and the tokenizer has neither bos nor eos; set "
            "eos_token"
        )

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt for a conversation; without a generation prompt, the last turn is gone on
        with.
        """
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; by default with special tokens, unless it begins with them (a chat's)."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def report(self) -> dict[str, Any]:
        """What ran since this was made, by task, as JSON values; see `ProgramsUsed.to_dict`. What
        lm-eval took from its response cache ran nothing, and is not in it.
        """
        policy = None if self._dispatcher is None else str(self._dispatcher.policy)
        exits = {} if self.exits is None else {"exits": self.exits.depths()}
        tasks = self.used.to_dict()
        return {"depth": self.compiled.depth, "policy": policy, **exits, "tasks": tasks}

    def get_model_info(self) -> dict[str, Any]:
        """The report, for the results' `config`."""
        return {"polar_fx": self.report()}

    # ---------------------------------------------------------------------------------- likelihoods

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it; or of a
        document's choices, at an early exit, how likely the whole model takes each (`ChoiceExits`).
        """
        found: dict[int, tuple[float, bool]] = {}
        if self.exits is not None:
            groups = self.exits.groups(requests, self._encode_pair)
            for group, told, program in self.exits.answers(groups):
                for places, one in zip(group.places, told, strict=True):
                    found |= dict.fromkeys(places, one)
                    self.used.add([requests[i] for i in places], [Decision(program)] * len(places))
        left = [request for i, request in enumerate(requests) if i not in found]
        if left:
            rest = iter(super().loglikelihood(left, disable_tqdm))
            self.used.add(left, self._decisions)
            found |= {i: next(rest) for i in range(len(requests)) if i not in found}
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each text, in windows of `max_length`, each token once.

        A window's context is one token, and all that its program is chosen from.
        """
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[i] += value
        self.used.add([requests[i] for i in owners], self._decisions)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows = [self._fitted(text, own, continuation=end) for text, own, end in requests]
        decisions = self._decide([context for context, _ in rows])
        # requests of one input, such as choices of one token, share a row
        programs: dict[Program, dict[Tokens, list[int]]] = {}
        for i, ((context, continuation), decision) in enumerate(zip(rows, decisions, strict=True)):
            programs.setdefault(decision.program, {}).setdefault(
                context + continuation[:-1], []
            ).append(i)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with tqdm(
            total=len(rows), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as bar:
            for program, inputs in programs.items():
                for batch in self._batches(inputs, len):
                    for row, logits in zip(batch, self._logits(program, batch), strict=True):
                        for i in inputs[row]:
                            results[i] = _score(logits, rows[i][1])
                            if requests[i][0] is not None:
                                self.cache_hook.add_partial(
                                    "loglikelihood", requests[i][0], results[i]
                                )
                            bar.update()
        self._decisions = decisions
        return results

    def _fitted(
        self, text: Any, context: list[int], *, continuation: list[int]
    ) -> tuple[Tokens, Tokens]:
        """The end of the context that fits beside the continuation, at least one token; the last
        token is not fed.
        """
        if not 1 <= len(continuation) <= self.max_length:
            raise InputError(
                f"a continuation has {len(continuation)} tokens ({text!r:.200}), not 1 to "
                f"max_length={self.max_length}; see that it is not empty, or compile with a "
                "larger max_length"
            )
        context = context or [self.prefix_token_id]
        room = self.max_length + 1 - len(continuation)
        if len(context) > room:
            log.warning("a context of %d tokens was cut to its last %d", len(context), room)
        return tuple(context[-room:]), tuple(continuation)

    def _logits(self, program: Program, rows: Sequence[Tokens]) -> list[Tensor]:
        """Logits [T, V] of each row."""
        runner = self.compiled.runner
        with runner.open(program, len(rows)) as session:
            return runner.prefill(session, [torch.tensor(r) for r in rows], every=True)

    # ----------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated for each context, without what it stopped at; sampling arguments go to
        `generate`.
        """
        asked = [Asked.of(request.args[1], self.max_gen_toks) for request in requests]
        contexts = [
            self._context(r.args[0], a.max_new_tokens) for r, a in zip(requests, asked, strict=True)
        ]
        decisions = self._decide(contexts)
        groups: dict[tuple[Program, str], list[int]] = {}
        for i, (a, decision) in enumerate(zip(asked, decisions, strict=True)):
            groups.setdefault((decision.program, a.key), []).append(i)
        texts = [""] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
        ) as bar:
            for (program, _), members in groups.items():
                for batch in self._batches(members, lambda i: len(contexts[i])):
                    made = self._generate(
                        program, [contexts[i] for i in batch], asked=asked[batch[0]]
                    )
                    for i, text in zip(batch, made, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        self.used.add(requests, decisions)
        return texts

    def _context(self, text: str, new_tokens: int) -> Tokens:
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks={new_tokens} leaves no room for a context in "
                f"max_length={self.max_length}; lower it in the task's generation_kwargs or here, "
                "or compile with a larger max_length"
            )
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        if len(tokens) > room:
            log.warning("a context of %d tokens was cut to its last %d", len(tokens), room)
        return tuple(tokens[-room:])

    def _generate(self, program: Program, contexts: Sequence[Tokens], *, asked: Asked) -> list[str]:
        ids, mask = padded_rows(contexts)
        special = {
            s: self.tokenizer.convert_tokens_to_ids(s)
            for s in asked.until
            if s in self.tokenizer.all_special_tokens
        }
        strings = [s for s in asked.until if s not in special]
        ends = [*self._ends, *special.values()]
        options = dict(asked.options)
        if strings:
            options["stopping_criteria"] = [
                StopStrings(self.tokenizer, strings, prompt_tokens=ids.shape[1])
            ]
        tokens = self.compiled.generate(
            ids.to(self.device),
            program=program,
            attention_mask=mask.to(self.device),
            max_new_tokens=asked.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=self.compiled.generator.pad_token(),
            **options,
        )
        return [
            new_text(self.tokenizer, row, ends=ends, until=strings)
            for row in tokens[:, ids.shape[1] :].tolist()
        ]

    @property
    def _ends(self) -> list[int]:
        """The tokens that end a text, by the model's generation config and by the tokenizer."""
        named = getattr(self.compiled.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return list(
            dict.fromkeys(t for t in (*named, self.tokenizer.eos_token_id) if t is not None)
        )

    # ------------------------------------------------------------------------- programs and batches

    @property
    def _dispatcher(self) -> Dispatcher | None:
        return None if self.program is not None else self.compiled.dispatcher

    def _decide(self, contexts: Sequence[Tokens]) -> list[Decision]:
        """A decision for each context; equal contexts are looked at once."""
        dispatcher = self._dispatcher
        if dispatcher is None:
            return [Decision(self.program or self.compiled.default_program)] * len(contexts)
        found: dict[Tokens, Decision] = {}
        for batch in self._batches(dict.fromkeys(contexts), len):
            found.update(
                zip(batch, dispatcher.choose(*padded_rows(batch, side="right")), strict=True)
            )
        return [found[context] for context in contexts]

    def _batches(self, items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
        """Batches of similar length, the longest first."""
        ordered = sorted(items, key=length, reverse=True)
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]


def _score(logits: Tensor, continuation: Tokens) -> tuple[float, bool]:
    """Log-likelihood of the tokens that the last of logits [T, V] predict, and whether each is the
    likeliest.
    """
    target = torch.tensor(continuation, device=logits.device)
    last = logits[-len(target) :].float()
    chosen = last.log_softmax(-1).gather(1, target[:, None])
    return float(chosen.sum()), bool((last.argmax(-1) == target).all())


def _move(model: Any, device: str) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the model cannot go to device={device!r}: {error}; use cpu, or a device there is"
        ) from error


def _check_compiled_already(options: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise InputError for options that a compiled model cannot follow any more."""
    if given := [f"{name}={value!r}" for name, value in options.items() if value is not None]:
        raise InputError(
            f"{', '.join(given)}: the model is compiled already; give it to polar_fx.compile or "
            "dispatch_by"
        )
    if tokenizer is None:
        raise InputError("a CompiledModel needs the tokenizer of its model; give tokenizer=")


def _compiled(pretrained: str | None, options: Mapping[str, Any]) -> tuple[CompiledModel, Any]:
    """The named model, loaded and compiled, and its own tokenizer."""
    dtype, device = options["dtype"], options["device"]
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"dtype is {dtype!r}; use one of {', '.join(_DTYPES)}")
    model, tokenizer = load(pretrained, _DTYPES[dtype or "float32"], quantize=options["quantize"])
    if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
        _move(model, device)  # lm-eval's command line says cuda:0 on machines without, too
    compiled = compile(
        model,
        options["backend"] or "auto",
        max_length=options["max_length"],
        predictor=options["predictor"],
        policy=options["policy"],
    )
    return compiled, tokenizer


def _count(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"{name} is {value!r}; give a whole number of at least 1")
    return number

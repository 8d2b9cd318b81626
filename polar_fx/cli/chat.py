"""Talk with a model: each answer is streamed, and a further turn reads only what is new.

/reset forgets what was said, /program TEXT goes on by another program, /exit or Ctrl-D ends it.
Ctrl-C stops an answer; what came of it stays in the history. Lines of a pipe are turns as well.

Examples:
  python -m polar_fx chat
  python -m polar_fx chat --program "skip 5" --system "Answer in one word."
  python -m polar_fx chat --model bundle --sample --temperature 0.7
  printf 'Name a color.\\nAnother one.\\n' | python -m polar_fx chat --json
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..errors import InputError, KvOverflowError, ProgramError
from .opened import BACKEND, bundle_of, compiled_or_interpreted
from .options import (
    add_length_argument,
    add_model_arguments,
    add_sampling_arguments,
    load_model,
    sampling,
    warm_up,
    whole,
)
from .shown import Shown
from .verbosity import status

if TYPE_CHECKING:
    from torch import Tensor

    from ..compiled import CompiledModel
    from ..program import Program
    from ..runtime.conversation import Conversation

_COMMANDS = "/reset, /program TEXT, /exit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first of all")
    parser.add_argument(
        "--program",
        action="append",
        metavar="PROGRAM",
        help="by which it answers (default: identity)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        default=512,
        metavar="N",
        help="of an answer (default: %(default)s)",
    )
    add_length_argument(parser, "the model's own limit")
    add_sampling_arguments(parser)
    add_model_arguments(parser, backend=BACKEND)
    # so that what is given can be told from what is not
    parser.set_defaults(dtype=None, backend=None)


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Answer turn by turn until there are no more; returns the turns."""
    if options.program and len(options.program) > 1:
        raise InputError(
            f"--program was given {len(options.program)} times; a chat runs one at a time, and "
            "/program TEXT changes over"
        )
    sampling(options)  # refuses what is wrong before anything is loaded
    compiled, tokenizer = _open(options)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer of this model has no chat template, so there are no turns to tell "
            "apart; use `run --raw`, or name a model that was tuned for chats"
        )
    import torch

    torch.manual_seed(options.seed)
    with _Chat(compiled, tokenizer, options=options) as chat:
        if sys.stdin.isatty():
            status().print(f"[dim]{_COMMANDS}; Ctrl-C stops an answer[/]")
        with contextlib.suppress(KeyboardInterrupt):  # where no answer is under way, it ends it
            for line in _lines():
                if line in ("/exit", "/quit"):
                    break
                chat.take(line)
    return {"backend": compiled.backend.name, "turns": chat.turns}


def _open(options: argparse.Namespace) -> tuple["CompiledModel", Any]:
    """The model or bundle, ready to answer, and its tokenizer."""
    from ..models import is_bundle

    if options.model is not None and is_bundle(options.model):
        return bundle_of(options)
    options.dtype = options.dtype or "float32"
    model, tokenizer = load_model(options)
    programs = options.program or [None]
    compiled = compiled_or_interpreted(
        model, options, max_length=options.max_length, programs=programs
    )
    warm_up(compiled, programs)
    return compiled, tokenizer


def _lines() -> Iterator[str]:
    """What is said, without blank lines, until the end of the input."""
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):  # editing and history, where there is readline
            import readline  # noqa: F401
    while True:
        try:
            line = input("> " if asks else "").strip()
        except (EOFError, KeyboardInterrupt):
            if asks:
                print(file=sys.stderr)  # the shell's prompt gets a line of its own
            return
        if line:
            yield line


class _Afresh:
    """A conversation that keeps nothing, where rows do not run in lock-step: each turn reads all
    of it.
    """

    tokens: Sequence[int] = ()

    def __init__(self, compiled: "CompiledModel", program: "Program") -> None:
        self._compiled, self._program = compiled, program

    def __len__(self) -> int:
        return 0

    def crop(self, length: int) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""

    def generate(self, tokens: list[int], **kwargs: Any) -> "Tensor":
        """The model's next tokens i64[N]."""
        import torch

        ids = torch.tensor([tokens])
        mask = torch.ones_like(ids)  # the text may hold what pads elsewhere
        out = self._compiled.generate(ids, attention_mask=mask, program=self._program, **kwargs)
        return out[0, len(tokens) :]


def _start(compiled: "CompiledModel", program: "Program") -> "Conversation | _Afresh":
    """A conversation that keeps what it has read, if it can."""
    return compiled.start(program) if compiled.runner.together else _Afresh(compiled, program)


class _Chat:
    """A history, and the keys and values of as much of it as was read."""

    def __init__(
        self, compiled: "CompiledModel", tokenizer: Any, *, options: argparse.Namespace
    ) -> None:
        self.compiled, self.tokenizer, self.options = compiled, tokenizer, options
        self.program = compiled.resolve((options.program or [None])[0])
        self.turns: list[dict[str, Any]] = []
        self._talk = _start(compiled, self.program)
        self._begin()

    def __enter__(self) -> "_Chat":
        return self

    def __exit__(self, *error: object) -> None:
        self._talk.close()

    def _begin(self) -> None:
        """Forget what was said; the system prompt stays."""
        system = self.options.system
        self.history = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> None:
        """One line: a command, or something to answer."""
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self._begin()
            status().print("[dim]forgotten[/]")
        elif command == "/program":
            self._change(rest.strip())
        elif command.startswith("/") and len(command) > 1 and command[1:].isalpha():
            status().print(f"no command {escape(command)}; known: {_COMMANDS}")
        else:
            self._answer(line)

    def _change(self, text: str) -> None:
        """Go on by another program, whose keys and values are made anew."""
        try:
            program = self.compiled.resolve(text or None)
        except ProgramError as error:
            status().print(str(error), markup=False)
            return
        warm_up(self.compiled, [program])
        self._talk.close()
        self.program, self._talk = program, _start(self.compiled, program)
        status().print(f"[dim]{escape(program.words)}, {program.num_steps} steps[/]")

    def _answer(self, line: str) -> None:
        """Answer, and keep both in the history; nothing of it where there is no room."""
        from ..engine.stable_text import StableText
        from .stopwatch import Stopwatch

        said = [*self.history, {"role": "user", "content": line}]
        ids = self.tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_dict=True
        ).input_ids
        room = self.compiled.pool.max_length - len(ids) + 1  # the last one is never fed back
        if room < 1:
            error = KvOverflowError(
                f"{len(ids)} tokens are more than the {self.compiled.pool.max_length} of a row"
            )
            status().print(f"{error}; /reset begins anew", markup=False)
            return
        kept = self._keep(ids)
        shown, shows = Shown(StableText(self.tokenizer)), not self.options.json
        answer: list[int] = []

        def take(new: list[int]) -> None:
            answer.extend(new)
            if shows:
                shown.add(new)

        watch = Stopwatch(take)
        with contextlib.suppress(KeyboardInterrupt):  # that stops the answer, not the chat
            self._talk.generate(
                ids[kept:],
                streamer=watch,
                max_new_tokens=min(self.options.max_new_tokens, room),
                **sampling(self.options),
            )
        if shows:
            shown.end()
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.history = [*said, {"role": "assistant", "content": text}]
        self._tell(line, text, new=len(answer), read=len(ids) - kept, kept=kept, watch=watch)

    def _keep(self, ids: list[int]) -> int:
        """Take back what was read and is not in these tokens; how many are kept."""
        pairs = zip(self._talk.tokens, ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if same is None:
            same = min(len(self._talk), len(ids))
        self._talk.crop(same)
        return same

    def _tell(self, prompt: str, text: str, *, new: int, read: int, kept: int, watch: Any) -> None:
        """Note a turn, and show what it cost."""
        times = {"prefill_ms": None, "token_ms": None}
        if new:
            times = {"prefill_ms": watch.prefill_ms, "token_ms": watch.token_ms}
        if new and not self.options.json:
            token = "" if watch.token_ms is None else f", {watch.token_ms:.1f} ms a token"
            status().print(
                f"[dim]{kept} tokens kept, {read} read in {watch.prefill_ms:.1f} ms{token}[/]"
            )
        self.turns.append(
            {
                "prompt": prompt,
                "text": text,
                "program": str(self.program),
                "kept_tokens": kept,
                "read_tokens": read,
                "new_tokens": new,
                **times,
            }
        )

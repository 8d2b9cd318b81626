"""Answer a prompt with one program or several.

Examples:
  python -m polar_fx run --prompt "Q: What is 6 * 7?" --program identity --program "skip 5"
  echo "The moon is" | python -m polar_fx run --prompt - --raw --max-new-tokens 20 --json
  python -m polar_fx run --prompt "Name a color." --program "0-9 (10-11)*2 12-29" --sample \\
      --temperature 0.7
  # runs on regions that `compile` made, if they are there; this makes them otherwise
  python -m polar_fx run --prompt "Name a color." --backend auto
  # each prompt by the program that the predictor in the box chooses for it
  printf '12 + 3 = 15\\n7 + 25 =' | python -m polar_fx run --predictor default --raw --prompt -
  # the code in a bundle is run: name one you trust
  python -m polar_fx run --prompt "Name a color." --model bundle
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..errors import InputError
from .checks import check_policy
from .opened import BACKEND, bundle_of, compiled_or_interpreted
from .options import (
    add_length_argument,
    add_model_arguments,
    add_sampling_arguments,
    load_model,
    row_length,
    sampling,
    warm_up,
    weights_as_trained,
    whole,
)
from .shown import Shown
from .verbosity import status

if TYPE_CHECKING:
    from torch import Tensor

    from ..compiled import CompiledModel
    from ..program import Program
    from ..runtime.dispatcher import Decision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what to answer; - reads it from stdin"
    )
    parser.add_argument(
        "--program",
        action="append",
        metavar="PROGRAM",
        help="program text; may be given several times",
    )
    parser.add_argument(
        "--predictor",
        metavar="FOLDER",
        help="let this predictor of `train` choose the program; default: the one in the box, which "
        "runs the embedded model in bfloat16",
    )
    parser.add_argument("--policy", help="by which it chooses (default: the one saved with it)")
    parser.add_argument("--max-new-tokens", type=whole(1), default=64, metavar="N")
    add_length_argument(parser, "256, or what prompt and answer need")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the text as it is; default: as a chat, if the model has one",
    )
    add_sampling_arguments(parser)
    add_model_arguments(parser, backend=BACKEND)
    # so that what is given can be told from what is not
    parser.set_defaults(dtype=None, backend=None)


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Generate with every program; returns and prints the texts and timings."""
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not text.strip():
        raise InputError("the prompt is empty; give some text with --prompt")
    sampling(options)  # refuses what is wrong before anything is loaded
    _check_chosen_by(options)
    compiled, tokenizer, ids = _open(options, text)
    if options.predictor is not None:
        decision, compile_s = _chosen(options, compiled, ids=ids)
        programs = {_told(decision): decision.program}
    else:
        decision = None
        programs = {p: compiled.resolve(p) for p in options.program or [None]}
        compile_s = warm_up(compiled, programs.values())
    results = [
        _answer(
            options,
            compiled,
            tokenizer=tokenizer,
            ids=ids,
            program=program,
            name=name or program.words,
        )
        for name, program in programs.items()
    ]
    if decision is not None:
        results[0] |= {"probability": decision.probability, "gain": decision.gain}
    return {
        "prompt_tokens": ids.shape[1],
        "max_length": compiled.pool.max_length,
        "backend": compiled.backend.name,
        "compile_s": compile_s,
        "results": results,
    }


def _chosen(
    options: argparse.Namespace, compiled: "CompiledModel", *, ids: "Tensor"
) -> tuple["Decision", float]:
    """What the predictor chooses for the prompt i64[1, T], and the seconds its menu took to
    compile.
    """
    dispatcher = compiled.dispatch_by(options.predictor, policy=options.policy)
    compile_s = warm_up(compiled, None)
    (decision,) = dispatcher.choose(ids)
    return decision, compile_s


def _told(decision: "Decision") -> str:
    chance = decision.probability
    sure = "" if chance is None else f", P(right) {chance:.2f} ({decision.gain:+.2f})"
    return f"chosen: {decision.program.words}{sure}"


def _check_chosen_by(options: argparse.Namespace) -> None:
    """Raise InputError where programs are named and a predictor is as well, or where there is a
    policy without one.
    """
    if options.predictor is not None and options.program:
        raise InputError(
            f"--program {options.program[0]!r} and --predictor exclude each other; leave one out"
        )
    check_policy(options)


def _open(options: argparse.Namespace, text: str) -> tuple["CompiledModel", Any, "Tensor"]:
    """The model or bundle, its tokenizer, and the prompt i64[1, T], which fits it."""
    from ..models import is_bundle

    if options.model is not None and is_bundle(options.model):
        bundle, tokenizer = bundle_of(options)
        ids = _encode(tokenizer, text, raw=options.raw)
        length, needed = bundle.pool.max_length, _tokens_needed(options, ids)
        if length < needed:
            raise InputError(
                f"the bundle's length of {length} is too short for {_asked(options, ids)}; ask "
                f"for fewer tokens, or export it with --max-length {needed}"
            )
        return bundle, tokenizer, ids

    weights_as_trained(options)
    model, tokenizer = load_model(options)
    ids = _encode(tokenizer, text, raw=options.raw)
    needed = _tokens_needed(options, ids)
    length = options.max_length or row_length(model, needed)
    if length < needed:
        raise InputError(
            f"--max-length {length} is too short for {_asked(options, ids)}; name at least {needed}"
        )
    programs = options.program or [None]
    compiled = compiled_or_interpreted(model, options, max_length=length, programs=programs)
    return compiled, tokenizer, ids


def _tokens_needed(options: argparse.Namespace, ids: "Tensor") -> int:
    return ids.shape[1] + options.max_new_tokens - 1  # the last one is never fed back


def _asked(options: argparse.Namespace, ids: "Tensor") -> str:
    return f"a prompt of {ids.shape[1]} tokens and --max-new-tokens {options.max_new_tokens}"


def _answer(
    options: argparse.Namespace,
    compiled: "CompiledModel",
    *,
    tokenizer: Any,
    ids: "Tensor",
    program: "Program",
    name: str,
) -> dict[str, Any]:
    """What one program says to the prompt i64[1, T], and how long that took; shown as it comes,
    unless the options ask for JSON.
    """
    import torch

    from ..engine.stable_text import StableText
    from .stopwatch import Stopwatch

    torch.manual_seed(options.seed)
    shown = Shown(StableText(tokenizer))
    if not options.json:
        status().print(f"[bold]{escape(name)}[/]  {program.num_steps} steps")
    watch = Stopwatch(None if options.json else shown.add)
    out = compiled.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # the text may hold what pads elsewhere
        program=program,
        streamer=watch,
        max_new_tokens=options.max_new_tokens,
        **sampling(options),
    )
    new = out[0, ids.shape[1] :]
    if not options.json:
        shown.end()
        token = "" if watch.token_ms is None else f", {watch.token_ms:.1f} ms a token"
        status().print(f"[dim]prefill {watch.prefill_ms:.1f} ms{token}[/]")
    return {
        "program": str(program),
        "name": name,
        "steps": program.num_steps,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
        "prefill_ms": watch.prefill_ms,
        "token_ms": watch.token_ms,
    }


def _encode(tokenizer: Any, text: str, *, raw: bool) -> Any:
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(text, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids

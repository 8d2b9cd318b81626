"""A program as a plain loop over a HuggingFace model's own layers: no cache, one row at a time; and
how rows are held against it.

Nothing of ours runs in the loop but the copy of the model's structure; it is what random programs
are held against.

Shape legend: T tokens, V vocabulary.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polar_fx.capture.support import find_stack, shared_view
from polar_fx.compiled import CompiledModel
from polar_fx.program import Program
from polar_fx.runtime.generator import padded_rows
from tiny_models import run_rows, tiny


class _Blends:
    """Opens and closes blends around the layer calls of one forward pass, which it counts."""

    def __init__(self, program: Program) -> None:
        self.steps, self.saved = program.schedule(), []
        self.opened = self.closed = 0

    def before(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.saved += [hidden] * self.steps[self.opened].opens
        self.opened += 1

    def after(self, layer: nn.Module, args: Any, result: Any) -> Any:
        hidden = result[0] if isinstance(result, tuple) else result
        for damping in self.steps[self.closed].closes:
            before = self.saved.pop()
            hidden = before + damping * (hidden - before)
        self.closed += 1
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden


@torch.no_grad()
def plain_logits(model: PreTrainedModel, program: Program, *, row: Tensor) -> Tensor:
    """Logits [T, V] of the tokens i64[T] of one row."""
    view = shared_view(model, model.config._attn_implementation)
    name = find_stack(view)
    layers: Any = view.get_submodule(name)
    config: Any = view.config.get_text_config(decoder=True)
    kinds, path = getattr(config, "layer_types", None), program.path
    view.set_submodule(name, nn.ModuleList([layers[i] for i in path]))
    vars(config)["num_hidden_layers"] = len(path)
    if kinds is not None:
        vars(config)["layer_types"] = [kinds[i] for i in path]
    blends = _Blends(program)
    for layer in {id(layers[i]): layers[i] for i in path}.values():
        layer.register_forward_pre_hook(blends.before, with_kwargs=True)
        layer.register_forward_hook(blends.after)
    logits = view(input_ids=row[None], use_cache=False).logits[0]
    if (blends.opened, blends.closed) != (len(path), len(path)):
        raise AssertionError(f"{type(model).__name__} ran {blends.closed} layers of {len(path)}")
    return logits


def random_programs(depth: int, count: int) -> list[Program]:
    """Random paths, with repeats, and damping over some steps."""
    draw = random.Random(depth)
    found = []
    for _ in range(count):
        path = [draw.randrange(depth) for _ in range(draw.randint(1, depth + 2))]
        found.append(Program.from_path(path, depth))
    return found


def lost(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a part of the largest logit."""
    return float((got - want).abs().max() / want.abs().max())


def check_rows(
    model: CompiledModel,
    source: Any,
    *,
    rows: Sequence[Tensor],
    each: Sequence[Program],
    chunk: int,
    loop: Any = plain_logits,
) -> None:
    """Logits of every token and greedy generation of 20 more, a program a row, are those of a plain
    loop over the layers of `source`, however prompts are cut.
    """
    model.runner.prefill_chunk = chunk
    ids, mask = padded_rows([row.tolist() for row in rows])
    logits = model.forward(ids, mask, program=list(each))
    options: Any = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    output = model.generate(ids, attention_mask=mask, program=list(each), **options)
    for i, (row, program) in enumerate(zip(rows, each, strict=True)):
        assert lost(logits[i, mask[i].bool()], loop(source, program, row=row)) < 2e-4
        new = output[i, ids.shape[1] :]
        want = loop(source, program, row=torch.cat((row, new[:-1])))[len(row) - 1 :]
        # greedy, but for ties within rounding
        assert lost(want.gather(-1, new[:, None])[:, 0], want.amax(-1)) < 2e-4


def check_kv_law(compiled: CompiledModel, row: Tensor, *, programs: Sequence[Program]) -> None:
    """A prefill of a row is the prefill of all tokens but the last, and a decode: logits, keys and
    values.
    """
    runner, count = compiled.runner, len(row)
    for program in programs:
        with runner.open_slots(program, 1) as whole, runner.open_slots(program, 1) as cut:
            first = runner.prefill(whole, [row])[0]
            runner.prefill(cut, [row[:-1]])
            assert lost(first, runner.decode(cut, row[-1:])[0]) < 1e-4
            for one, other in zip(whole.slots, cut.slots, strict=True):
                for a, b in zip(one, other, strict=True):
                    torch.testing.assert_close(
                        a[..., :count, :], b[..., :count, :], rtol=0, atol=1e-4
                    )


def check_programs(family: str, rows: list[Tensor], *, count: int) -> None:
    """The identity and random programs of a tiny model are a plain loop, by the interpreter: four
    ragged rows in two ragged parts, and then token by token.
    """
    model, library = tiny(family).model, tiny(family).library
    for program in (Program.identity(library.depth), *random_programs(library.depth, count)):
        got = run_rows(library, program, rows=rows, prefill=(11, 6, 3, 1))
        for own, row in zip(got, rows, strict=True):
            assert lost(own, plain_logits(model, program, row=row)) < 2e-4

"""A model must give the same when it runs as users run it: before anyone does, the identity is
held against the model on a few random tokens.

What runs is the runner itself, by the interpreter: the real KV length with its spare column, a
ragged batch in parts, the last step for the last token alone, and decoding past a part, past a
sliding window and past a change of rotary frequencies. Where such a change comes late, a few tokens
run after random keys and values in place of a long prompt.

Shape legend: B batch, T tokens, L columns, H KV heads, E head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from ..backends import EagerBackend
from ..capture import CACHE, KvSpec
from ..capture.checked import REMEDY, random_tokens, tolerance
from ..capture.rotary import frequency_switch
from ..capture.support import position_limit, shared_view, without_autocast
from ..errors import CaptureError
from ..library import LayerLibrary
from ..passes.address_kv import BLOCK
from ..program import Program
from .kv_cache import KvSession
from .lockstep_session import LockstepSession
from .regions import RegionTable
from .row_length import IN_SLOTS
from .runner import Runner, Session

_FEW, _PART = 12, 5  # tokens of a row and of a part, unless something changes later on
_MOST = 256  # what changes later than this is not waited for: keys and values are made up
_MOST_BYTES = 1 << 30  # of those that are made up
_AFTER = 5  # tokens that run after them
_LOUD = 6  # first tokens whose values are large

Opener = Callable[[Program, int], AbstractContextManager[Session]]


@torch.no_grad()
def check_runs(model: PreTrainedModel, library: LayerLibrary, *, max_length: int | None) -> None:
    """Raise CaptureError, with what was run and the difference, if the identity does not give the
    model's logits. Without `max_length`, rows are as short as they may be in slots.
    """
    max_length = max_length or min(IN_SLOTS, position_limit(model) or IN_SLOTS)
    regions = RegionTable(library, EagerBackend(), max_length=max_length, store=None, workers=0)
    runner = Runner.of_model(model, regions, prefill_chunk=_PART)
    reference = shared_view(model, model.config._attn_implementation)
    with without_autocast(library.device):
        rows = [row.to(library.device) for row in _rows(model, max_length)]
        wanted = [reference(input_ids=r[None], use_cache=False).logits[0] for r in rows]
        lengths = " and ".join(str(len(r)) for r in rows)
        # keys and values in slots, and in blocks where rows run in lock-step
        ways: Sequence[Opener] = (runner.open,)
        if runner.together:
            ways = runner.open_slots, runner.open
        for opened in ways:
            with opened(Program.identity(runner.depth), len(rows)) as session:
                got = runner.prefill(session, rows, every=True)
            _compare(model, f"prefill of rows of {lengths} tokens", got=got, wanted=wanted)
        if min(map(len, rows)) < 2:
            return
        # alone: with another token, a row may have other rotary frequencies
        shorter = [reference(input_ids=r[None, :-1], use_cache=False).logits[0, -1] for r in rows]
        ends = [torch.stack((a, b[-1])) for a, b in zip(shorter, wanted, strict=True)]
        for opened in ways:
            with opened(Program.identity(runner.depth), len(rows)) as session:
                got = _decoded(runner, session, rows=rows)
            _compare(model, f"decoding of rows of {lengths} tokens", got=got, wanted=ends)
        for held in _late(model, max_length):
            _check_after(model, reference, runner=runner, ways=ways, held=held)


def _check_after(
    model: PreTrainedModel, reference: Any, *, runner: Runner, ways: Sequence[Opener], held: int
) -> None:
    """The same of the tokens that follow `held` others, whose keys and values are random."""
    identity = Program.identity(runner.depth)
    specs = runner.library.kv_specs(identity)
    if runner.library.table.keeps_states or any(spec.more_columns for spec in specs):
        return  # no state fits keys and values that are made up, and no choice among them is sure
    if sum(spec.bytes_per_token() for spec in specs) * held > _MOST_BYTES:
        return
    generator = torch.Generator().manual_seed(0)
    before = [_made_up(spec, held, generator=generator, device=runner.device) for spec in specs]
    tail = random_tokens(model, _AFTER, generator=generator)
    cache = DynamicCache()
    for layer, pair in enumerate(before):
        if pair:
            cache.update(pair[0], pair[1], layer)
    wanted = reference(input_ids=tail[None].to(runner.device), **{CACHE: cache}).logits[0]
    for opened in ways:
        with opened(identity, 1) as session:
            _fill(session, specs, before=before, held=held)
            first = runner.prefill(session, [tail[:-1]], every=True)[0]
            last = runner.decode(session, tail[-1:])
        _compare(
            model, f"{_AFTER} tokens after {held}", got=[torch.cat((first, last))], wanted=[wanted]
        )


def _made_up(
    spec: KvSpec, held: int, *, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, ...]:
    """Keys and values [1, H, L, E] of a layer, if it has its own. The values of the first tokens,
    which are the first that a window hides, are so large that attending to one of them shows among
    all others.
    """
    if not spec.heads:
        return ()
    keys, values = (
        torch.randn(1, spec.heads, held, size, generator=generator)
        for size in (spec.key_size, spec.value_size)
    )
    values[:, :, :_LOUD] *= held
    return (keys / 10).to(device, spec.dtype), values.to(device, spec.dtype)


def _fill(
    session: Session, specs: Sequence[KvSpec], *, before: Sequence[tuple[Tensor, ...]], held: int
) -> None:
    """Let the only row of a session hold these keys and values."""
    if isinstance(session, LockstepSession):
        (row,) = session.rows.rows
        row.make_room(held)
        places, missing = row.table[:, : row.num_blocks], -held % BLOCK
        for spec, where, pair in zip(specs, places, before, strict=True):
            for store, own in zip(row.store.tensors(spec), pair, strict=True):
                blocks = pad(own[0], (0, 0, 0, missing)).unflatten(1, (-1, BLOCK))
                store[where] = blocks.transpose(0, 1)
        row.length = held
        return
    assert isinstance(session, KvSession)
    session.will_write(held)
    for slot, pair in zip(session.slots, before, strict=True):
        for whole, own in zip(slot, pair, strict=True):
            whole[:, :, :held] = own
    session.advance([held])


def _rows(model: PreTrainedModel, max_length: int) -> list[Tensor]:
    """Two rows of random tokens, the longer one past what changes with the length."""
    near = [n for n in (*_windows(model), _switch(model)) if 0 < n <= _MOST]
    long = min(max_length, max([_FEW, *(n + 3 for n in near)]))
    generator = torch.Generator().manual_seed(0)
    lengths = [long, max(1, long - 2 if near else long // 2)]
    return [random_tokens(model, n, generator=generator) for n in lengths]


def _late(model: PreTrainedModel, max_length: int) -> list[int]:
    """After how many tokens to look at what changes late: just before a window is full, and where
    the other frequencies are those of every further token.
    """
    starts = {n - 1 for n in _windows(model) if n > _MOST}
    starts |= {n + 1 for n in (_switch(model),) if n > _MOST}
    return sorted(n for n in starts if n + _AFTER <= max_length)


def _windows(model: PreTrainedModel) -> list[int]:
    config: Any = model.config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return [n for n in found if isinstance(n, int)]


def _switch(model: PreTrainedModel) -> int:
    """The most tokens of a row with the first rotary frequencies; 0: there are no others."""
    return frequency_switch(model.config) or 0


def _decoded(runner: Runner, session: Session, *, rows: list[Tensor]) -> list[Tensor]:
    """Logits [2, V] of each row's last two tokens, the last one decoded."""
    before = runner.prefill(session, [r[:-1] for r in rows])
    after = runner.decode(session, torch.stack([r[-1] for r in rows]))
    return [torch.stack(pair) for pair in zip(before, after, strict=True)]


def _compare(model: PreTrainedModel, what: str, *, got: list[Tensor], wanted: list[Tensor]) -> None:
    """Raise CaptureError, naming `what` was run, if rows [T, V] differ from those wanted."""
    worst = scale = 0.0
    for own, want in zip(got, wanted, strict=True):
        finite = torch.isfinite(want)
        if bool(finite.any()):
            lost = (own - want)[finite].abs().nan_to_num(torch.inf)
            worst = max(worst, float(lost.max()))
            scale = max(scale, float(want[finite].abs().max()))
    if worst > tolerance(model) * (scale or 1.0):
        raise CaptureError(
            f"{type(model).__name__} is not supported: in {what}, logits differ from the model's "
            f"by {worst:.2g} (largest logit {scale:.2g}); {REMEDY}"
        )

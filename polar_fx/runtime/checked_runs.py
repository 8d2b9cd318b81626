"""Whether a model runs as `compile` will run it: `check=True`.

A capture is compared with its model when it is made (`capture/checked.py`), on one slot of its own.
Here the runner itself is, by the interpreter: the real KV length with its spare column, a ragged
batch in parts, the last step for the last token alone, and decoding past a part, past a sliding
window and past a change of rotary frequencies.

Shape legend: T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backends import EagerBackend
from ..capture.checked import REMEDY, tolerance
from ..capture.rotary import frequency_switch
from ..capture.support import embedding_weight, shared_view, without_autocast
from ..errors import CaptureError
from ..library import LayerLibrary
from ..program import Program
from .regions import RegionTable
from .runner import Runner, Session

_FEW, _PART = 12, 5  # tokens of a row and of a part, unless something changes later on
_MOST = 256  # what changes later than this is not waited for


@torch.no_grad()
def check_runs(model: PreTrainedModel, library: LayerLibrary, max_length: int) -> None:
    """Raise CaptureError, with what was run and the difference, if the identity does not give the
    model's logits.
    """
    regions = RegionTable(library, EagerBackend(), max_length, None, 0)
    runner = Runner.of_model(model, regions, prefill_chunk=_PART)
    reference = shared_view(model, model.config._attn_implementation)
    with without_autocast(library.device):
        rows = _rows(model, max_length)
        wanted = [reference(input_ids=r[None], use_cache=False).logits[0] for r in rows]
        lengths = " and ".join(str(len(r)) for r in rows)
        # keys and values in slots, and in blocks where rows run in lock-step
        ways = (runner.open_slots, runner.open) if runner.together else (runner.open,)
        for opened in ways:
            with opened(Program.identity(runner.depth), len(rows)) as session:
                got = runner.prefill(session, rows, every=True)
            _compare(model, f"prefill of rows of {lengths} tokens", got, wanted)
        if min(map(len, rows)) < 2:
            return
        # alone: with another token, a row may have other rotary frequencies
        shorter = [reference(input_ids=r[None, :-1], use_cache=False).logits[0, -1] for r in rows]
        ends = [torch.stack((a, b[-1])) for a, b in zip(shorter, wanted, strict=True)]
        for opened in ways:
            with opened(Program.identity(runner.depth), len(rows)) as session:
                got = _decoded(runner, session, rows)
            _compare(model, f"decoding of rows of {lengths} tokens", got, ends)


def _rows(model: PreTrainedModel, max_length: int) -> list[Tensor]:
    """Two rows of random tokens, the longer one past what changes with the length."""
    config: Any = model.config.get_text_config(decoder=True)
    names = ("sliding_window", "attention_chunk_size")
    changes = [getattr(config, name, None) for name in names] + [frequency_switch(config)]
    near = [n for n in changes if isinstance(n, int) and 0 < n <= _MOST]
    long = min(max_length, max([_FEW, *(n + 3 for n in near)]))
    generator = torch.Generator().manual_seed(0)
    weight = embedding_weight(model)
    lengths = [long, max(1, long - 2 if near else long // 2)]
    return [torch.randint(weight.shape[0], (n,), generator=generator) for n in lengths]


def _decoded(runner: Runner, session: Session, rows: list[Tensor]) -> list[Tensor]:
    """Logits [2, V] of each row's last two tokens, the last one decoded."""
    before = runner.prefill(session, [r[:-1] for r in rows])
    after = runner.decode(session, torch.stack([r[-1] for r in rows]))
    return [torch.stack(pair) for pair in zip(before, after, strict=True)]


def _compare(model: PreTrainedModel, what: str, got: list[Tensor], wanted: list[Tensor]) -> None:
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

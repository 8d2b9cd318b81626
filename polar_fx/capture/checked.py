"""Trust, but verify: a captured graph must compute what the model computes before anyone runs
it.
"""

import logging
import warnings

import torch
from transformers import PreTrainedModel

from ..errors import CaptureError, ModelWarning
from . import CapturedModel, attention_variants, capture, embedding_weight, shared_view
from .support import first_position, without_autocast
from .trace import TRACING

log = logging.getLogger("polar_fx.check")

# Largest accepted difference of logits, relative to the largest logit, whatever its size: rounding
# grows with the numbers. In bfloat16 it is up to 0.025 for tiny models of 44 families, and 0.06
# between two ways to run a random one of 28 layers.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_LENGTHS, _SPLITS = (9, 6), (5, 2)
REMEDY = (
    "use a model whose code follows transformers' current cache and mask interfaces; "
    "docs/models.md says what is needed"
)


def tolerance(model: PreTrainedModel) -> float:
    """Largest accepted difference of logits, as a part of the largest logit: that of the coarsest
    type among the model's weights, since a model may keep some parts in a finer one.
    """
    found = {p.dtype for p in model.parameters()} & _TOLERANCE.keys()
    return max((_TOLERANCE[dtype] for dtype in found), default=_TOLERANCE[torch.float32])


def random_tokens(
    model: PreTrainedModel, count: int, *, generator: torch.Generator
) -> torch.Tensor:
    """Token ids i64[count]; none of padding, where the model counts positions without it."""
    vocab = embedding_weight(model).shape[0]
    tokens = torch.randint(vocab, (count,), generator=generator)
    if first_position(model):
        padding = model.config.get_text_config(decoder=True).pad_token_id
        if padding is not None:
            tokens[tokens == padding] = (padding + 1) % vocab
    return tokens


@torch.no_grad()
def max_difference(model: PreTrainedModel, captured: CapturedModel) -> tuple[float, float]:
    """(largest absolute logit difference, largest absolute logit) of identity against the model
    itself.

    Two rows of different length, fed as one ragged batch in two parts that start at different
    positions, against each row alone in the model: that exercises per-row positions, masks and the
    KV slots.
    """
    reference = shared_view(model, model.config._attn_implementation)
    device = captured.device
    generator = torch.Generator().manual_seed(0)
    rows = [random_tokens(model, n, generator=generator).to(device) for n in _LENGTHS]
    length = 16
    slots = [
        part for spec in captured.kv_specs for part in spec.slot(2, length=length, device=device)
    ]
    index = torch.arange(length, device=device)
    got: list[list[torch.Tensor]] = [[], []]
    for starts, stops in (((0, 0), _SPLITS), (_SPLITS, _LENGTHS)):
        pieces = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
        tokens = max(p.stop - p.start for p in pieces)
        # padding: a row's own last token, in the spare column
        ids = torch.stack([row[-1:].expand(tokens) for row in rows]).clone()
        positions = torch.full_like(ids, length - 1)
        for own, places, row, piece in zip(ids, positions, rows, pieces, strict=True):
            own[: piece.stop - piece.start] = row[piece]
            places[: piece.stop - piece.start] = index[piece]
        logits = captured.graph_module(ids, positions, index, *slots)
        for row, piece in enumerate(pieces):
            got[row].append(logits[row, : piece.stop - piece.start])
    worst = scale = 0.0
    for row, pieces in zip(rows, got, strict=True):
        want = reference(input_ids=row[None], use_cache=False).logits[0]
        both = torch.isfinite(want)
        if not both.any():
            continue
        worst = max(
            worst, float((torch.cat(pieces) - want)[both].abs().nan_to_num(torch.inf).max())
        )
        scale = max(scale, float(want[both].abs().max()))
    return worst, scale


def capture_checked(model: PreTrainedModel, check: bool = True) -> CapturedModel:
    """Capture with the first attention variant whose graph agrees with the model.

    Raises CaptureError with the measured difference if none does, UnsupportedModelError as
    `capture` does.
    """
    with TRACING, without_autocast(embedding_weight(model).device):
        return _first_that_agrees(model, check)


def _first_that_agrees(model: PreTrainedModel, check: bool) -> CapturedModel:
    variants = attention_variants(model)
    if not check:
        return capture(model, variants[0])
    problems: list[str] = []
    error: CaptureError | None = None
    for variant in variants:
        try:
            captured = capture(model, variant)
        except CaptureError as failed:
            problems.append(str(failed))
            error = error or failed
            continue
        worst, scale = max_difference(model, captured)
        if worst <= tolerance(model) * (scale or 1.0):
            log.info("identity agrees with the model: largest logit difference %.1e", worst)
            return captured
        problems.append(
            f"traced with {variant}, logits differ from the model's by {worst:.2g} (largest logit "
            f"{scale:.2g})"
        )
    raise CaptureError(
        f"{type(model).__name__} is not supported: {'; '.join(dict.fromkeys(problems))}; {REMEDY}"
    ) from error


@torch.no_grad()
def warn_if_not_finite(model: PreTrainedModel) -> None:
    """Warn (ModelWarning) if weights hold NaN or infinity, naming where: a damaged checkpoint gives
    NaN answers.
    """
    plain = {
        n: p
        for n, p in model.named_parameters()
        if type(p) is torch.nn.Parameter and p.is_floating_point()
    }
    bad = {n: p for n, p in plain.items() if not _all_finite(p)}
    if bad:
        shown = ", ".join(
            f"{n} ({int((~torch.isfinite(p)).sum())} of {p.numel()})"
            for n, p in list(bad.items())[:3]
        )
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        warnings.warn(
            f"weights are NaN or infinite in {shown}{more}; the checkpoint is probably damaged: "
            "load it again, or in a wider dtype",
            ModelWarning,
            stacklevel=3,
        )


def _all_finite(weight: torch.Tensor) -> bool:
    # extremes first: NaN and infinity both reach them, and it is one pass without a mask as large
    # as the weight
    return weight.numel() == 0 or bool(torch.isfinite(torch.stack(weight.aminmax())).all())

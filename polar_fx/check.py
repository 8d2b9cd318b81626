"""Trust, but verify: a captured graph must compute what the model computes before anyone runs it."""

import copy
import logging

import torch
from transformers import PreTrainedModel

from .capture import CapturedModel, attention_variants, capture
from .errors import CaptureError

log = logging.getLogger("polar_fx.check")

# Largest accepted difference of logits, relative to the largest logit.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_LENGTHS, _SPLIT = (9, 6), 5


@torch.no_grad()
def max_difference(model: PreTrainedModel, captured: CapturedModel) -> tuple[float, float]:
    """(largest absolute logit difference, largest absolute logit) of identity against the model itself.

    Two rows of different length, fed as one ragged batch in two parts, against each row alone in the model: that
    exercises per-row positions, masks and the KV slots.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    reference = copy.deepcopy(model, tensors).eval()  # type: ignore[arg-type]  # shares all tensors
    device, vocab = captured.device, model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, vocab, (n,), generator=generator).to(device) for n in _LENGTHS]
    length = 16
    kv = [torch.zeros(s, dtype=spec.dtype, device=device) for spec in captured.kv_specs for s in spec.shapes(2, length)]
    index = torch.arange(length, device=device)
    got: list[list[torch.Tensor]] = [[], []]
    for part in (slice(0, _SPLIT), slice(_SPLIT, max(_LENGTHS))):
        pieces = [r[part] for r in rows]
        ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        steps = torch.arange(part.start, part.start + ids.shape[1], device=device)
        positions = torch.stack([torch.where(steps < len(r), steps, length - 1) for r in rows])
        logits = captured.graph_module(ids, positions, index, *kv)
        for row, piece in enumerate(pieces):
            got[row].append(logits[row, : len(piece)])
    worst = scale = 0.0
    for row, pieces in zip(rows, got, strict=True):
        want = reference(input_ids=row[None], use_cache=False).logits[0]
        both = torch.isfinite(want)
        if not both.any():
            continue
        worst = max(worst, float((torch.cat(pieces) - want)[both].abs().nan_to_num(torch.inf).max()))
        scale = max(scale, float(want[both].abs().max()))
    return worst, scale


def capture_checked(model: PreTrainedModel, check: bool = True) -> CapturedModel:
    """Capture with the first attention variant whose graph agrees with the model.

    Raises CaptureError with the measured difference if none does, UnsupportedModelError as `capture` does.
    """
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
        if worst <= _TOLERANCE[captured.dtype] * max(scale, 1.0):
            log.info("identity agrees with the model: largest logit difference %.1e", worst)
            return captured
        problems.append(f"traced with {variant}, logits differ from the model's by {worst:.2g} (largest logit {scale:.2g})")
    raise CaptureError(
        f"no trace of {type(model).__name__} computes what the model does ({'; '.join(problems)}); "
        "this architecture is not supported"
    ) from error

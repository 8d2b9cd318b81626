"""The machine and its kernels: bandwidth, attention of one token over a slot, matrix-vector
products.

Shape legend: B batch, H query heads, N heads of keys and values, G = H / N, L KV length, E head
size.
"""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from gpu_worker import TUNED, Worker, reason

# H, N, E
_HEADS = {"qwen2.5-7b": (28, 4, 128), "llama-3.2-3b": (24, 8, 128), "smollm2-135m": (9, 3, 64)}
_LINEARS = ((896, 4864), (3072, 8192), (3584, 18944), (2048, 151936))
_MORE_THAN_CACHED = 200 << 20  # bytes of weights that no L2 holds


def environment(worker: Worker) -> None:
    """Versions and the card; copy and read bandwidth."""
    import transformers

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
        "device": worker.device.type,
    }
    if worker.on_gpu:
        card = torch.cuda.get_device_properties(worker.device)
        facts |= {
            "gpu": card.name,
            "multiprocessors": card.multi_processor_count,
            "gib": card.total_memory >> 30,
            "l2_mib": card.L2_cache_size >> 20,
            "cudnn": torch.backends.cudnn.version(),
            "cuda": torch.version.cuda,
        }
    worker.say("env", **facts)
    values = torch.randn(1 << (16 if worker.tiny else 30), device=worker.device)
    other = torch.empty_like(values)
    copied = worker.replay_ms(worker.captured(lambda: other.copy_(values)), inner=5)
    summed = worker.replay_ms(worker.captured(values.sum), inner=5)
    worker.say(
        "bandwidth",
        copy_gbs=round(2 * values.nbytes / copied / 1e6, 1),
        sum_gbs=round(values.nbytes / summed / 1e6, 1),
    )


@dataclass
class _Job:
    """What is compared: by label the work, run once already, and what it said then or why it cannot
    run.
    """

    stage: str
    about: dict[str, Any]
    works: dict[str, tuple[Callable[[], Any] | None, Any]] = field(default_factory=dict)

    def add(
        self,
        label: str,
        work: Callable[[], Any],
        *,
        note: Callable[[Any], Any] = lambda result: None,
    ) -> None:
        try:
            self.works[label] = work, note(work())
        except Exception as error:
            self.works[label] = None, reason(error, 120)


def attention_ways(
    q: Tensor, k: Tensor, *, v: Tensor, mask: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Attention of one token, q [B, H, 1, E] over k and v [B, N, L, E] with a mask [B, 1, 1, L], in
    ways that agree.
    """
    batch, heads, _, size = q.shape
    kv, length = k.shape[1:3]
    groups = heads // kv

    def expanded() -> Tensor:
        wide = [
            t[:, :, None]
            .expand(batch, kv, groups, length, size)
            .reshape(batch, heads, length, size)
            for t in (k, v)
        ]
        return scaled_dot_product_attention(q, *wide, attn_mask=mask)

    def grouped() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def packed() -> Tensor:
        """The query heads of a group as the queries of one head."""
        return scaled_dot_product_attention(
            q.reshape(batch, kv, groups, size), k, v, attn_mask=mask
        ).reshape(q.shape)

    def written_out() -> Tensor:
        scores = (
            q.view(batch, kv, groups, 1, size).float() * size**-0.5 * k[:, :, None].float()
        ).sum(-1)
        weights = torch.where(mask[:, :, 0][:, :, None], scores, float("-inf")).softmax(-1)
        return (weights[..., None] * v[:, :, None].float()).sum(-2).to(q.dtype).view(q.shape)

    return {"expanded": expanded, "grouped": grouped, "packed": packed, "written out": written_out}


def _attention(worker: Worker, name: str, *, batch: int, length: int) -> _Job:
    heads, kv, size = _HEADS[name]
    q = torch.randn(batch, heads, 1, size, device=worker.device, dtype=torch.bfloat16)
    k, v = (
        torch.randn(batch, kv, length, size, device=worker.device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    mask = (torch.arange(length, device=worker.device) < length - 3)[None, None, None].expand(
        batch, 1, 1, length
    )
    ways = attention_ways(q, k, v=v, mask=mask)
    want = ways["expanded"]().float()
    job = _Job("attention", dict(model=name, batch=batch, length=length, bytes=2 * k.nbytes))

    def apart(result: Tensor) -> float:
        return round(float((result.float() - want).abs().max()), 4)

    for label in ("expanded", "grouped", "packed"):
        for backend in (
            (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
            if worker.on_gpu
            else (SDPBackend.MATH,)
        ):
            if (label, backend) == ("grouped", SDPBackend.EFFICIENT_ATTENTION):
                continue  # it takes no grouped heads

            def work(
                way: Callable[[], Tensor] = ways[label], backend: SDPBackend = backend
            ) -> Tensor:
                with sdpa_kernel(backend):
                    return way()

            job.add(f"{label} {backend.name.partition('_')[0].lower()}", work, note=apart)
    if length != 1040 and (batch == 1 or name == "qwen2.5-7b"):
        way = ways["written out"]
        job.add(
            "written out", way if worker.tiny else torch.compile(way, dynamic=False), note=apart
        )
    return job


def _linear(worker: Worker, inner: int, *, outer: int) -> _Job:
    copies = 1 if worker.tiny else min(24, max(2, _MORE_THAN_CACHED // (2 * inner * outer)))
    weights = [
        torch.randn(outer, inner, device=worker.device, dtype=torch.bfloat16) for _ in range(copies)
    ]
    x = torch.randn(1, inner, device=worker.device, dtype=torch.bfloat16)
    job = _Job(
        "linear", dict(size=[inner, outer], copies=copies, bytes=sum(w.nbytes for w in weights))
    )

    def products() -> list[Tensor]:
        return [linear(x, w) for w in weights]

    job.add("library", products)
    for label, options in (("inductor", {}), ("inductor cdt", TUNED)) if not worker.tiny else ():
        if worker.left() > 15:
            job.add(label, torch.compile(products, dynamic=False, options=options))
    return job


def micro(worker: Worker) -> None:
    """Which attention and which matrix-vector product regions should use on this card."""
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 256  # one code, many shapes
    lengths, batches = ((32,), (1, 2)) if worker.tiny else ((272, 1040, 4112, 32784), (1, 8))
    jobs = [
        _attention(worker, name, batch=batch, length=length)
        for name in _HEADS
        for batch in batches
        for length in lengths
        if length < 5000 or (batch == 1 and name == "qwen2.5-7b")
    ]
    jobs += [
        _linear(worker, inner, outer=outer)
        for inner, outer in (((64, 96),) if worker.tiny else _LINEARS)
    ]
    worker.wait_for_turn()
    for job in jobs:
        with worker.attempt(job.stage, **job.about):
            found: dict[str, Any] = {}
            for label, (work, note) in job.works.items():
                if work is None:
                    found[label] = note
                    continue
                ms = worker.replay_ms(worker.captured(work), 3, inner=10)
                found[label] = (
                    [round(1e3 * ms, 2), note]
                    if job.stage == "attention"
                    else round(job.about["bytes"] / ms / 1e6, 1)
                )
            worker.say(
                job.stage,
                **job.about,
                **{"us_and_difference" if job.stage == "attention" else "gbs": found},
            )
    worker.finished()

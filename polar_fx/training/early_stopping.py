"""What small networks trained here share: checked settings, and epochs of which the best on
validation is kept.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

Progress = Callable[[int, dict[str, float]], None]


def check_ranges(settings: Any, what: str, *, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise InputError if a setting lies outside its (lowest, highest) value."""
    for name, (low, high) in ranges.items():
        if not low <= getattr(settings, name) <= high:
            raise InputError(
                f"{name} of {what} is {getattr(settings, name)!r}; give a number from {low} to "
                f"{high}"
            )


def train_to_best(
    network: nn.Module,
    num_rows: int,
    *,
    loss_of: Callable[[Tensor], Tensor],
    validation_loss: Callable[[], float],
    config: Any,
    progress: Progress | None,
) -> dict[str, Any]:
    """Train with AdamW and leave the weights of the epoch with the lowest validation loss, the
    start included; the history.

    `loss_of(rows)` is the loss on those of `num_rows` rows, drawn in batches; `config` has
    learning_rate, weight_decay, batch, epochs, patience and seed. `progress(epoch, losses)` is
    called after each epoch.
    """
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )

    @torch.no_grad()
    def validate() -> float:
        network.eval()
        return validation_loss()

    best, best_state, best_epoch = validate(), copy.deepcopy(network.state_dict()), 0
    history: list[dict[str, Any]] = [{"epoch": 0, "train": None, "validation": best}]
    for epoch in range(1, config.epochs + 1):
        network.train()
        total = 0.0
        for part in torch.randperm(num_rows, generator=generator).split(config.batch):
            optimizer.zero_grad()
            loss = loss_of(part)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(part)
        now = {"train": total / num_rows, "validation": validate()}
        history.append({"epoch": epoch, **now})
        if progress is not None:
            progress(epoch, now)
        if now["validation"] < best:
            best, best_state, best_epoch = (
                now["validation"],
                copy.deepcopy(network.state_dict()),
                epoch,
            )
        elif epoch - best_epoch >= config.patience:
            break
    network.load_state_dict(best_state)
    network.eval()
    return {"best_epoch": best_epoch, "validation_loss": best, "history": history}

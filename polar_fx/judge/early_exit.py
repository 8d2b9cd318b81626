"""When the first layers are enough: a question with choices is answered after them where they are
sure enough to choose what the whole model would.

After `num_steps` layers the model's own norm and head score the choices. A gate (logistic, over the
scores alone) says how likely it is that all layers would choose the same. Where that reaches the
threshold the answer is taken; otherwise the other layers go on from there, so no layer runs twice.
Learning needs no answer key: its label is whether both choose the same. Exits by confidence are
those of CALM (Schuster et al., arXiv 2207.07061), here a program `0-3` or the identity.

Shape legend: N questions, C choices of a question, F features.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..output.files import write_whole
from ..questions.choices import best_choice, log_shares
from ..stats.calibration import sigmoid

if TYPE_CHECKING:
    from ..library import LayerLibrary

FORMAT, VERSION = "polar_fx.early_exits", 1
_NUM_FEATURES = 8  # of ChoiceScores.features


@dataclass(frozen=True)
class ChoiceScores:
    """Of one question by one program: the score of each choice, in nats (nats a character where
    lengths count), and how many tokens of each were scored.
    """

    scores: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def best(self) -> int:
        """The place of the choice that is taken."""
        return best_choice(self.scores)

    def features(self) -> np.ndarray:
        """What the gate sees, f64[F]: the lead, the shares of the best choice and their entropy,
        and how long the best choice is beside the others.
        """
        known = np.array([s if math.isfinite(s) else -1e9 for s in self.scores])
        place, lengths = self.best, np.array(self.tokens, dtype=float)
        shares = np.exp(log_shares(self.scores))
        a_token = known / lengths
        return np.array(
            [
                known[place] - np.delete(known, place).max(),
                shares[place],
                -(shares * np.log(shares + 1e-12)).sum(),
                a_token[place] - np.delete(a_token, place).max(),
                lengths[place] - np.delete(lengths, place).min(),
                lengths.max() - lengths.min(),
                math.log(lengths[place]),
                known.std(),
            ]
        )


@dataclass(frozen=True)
class EarlyExit:
    """The exit of one task: after `num_steps` layers, where the gate reaches `threshold` (infinity:
    never).

    `mean`, `scale` and `weights` are numbers of the gate, the bias last. `expected` are the shares
    that were found on train questions, cross-fitted: of questions that leave, of those that choose
    as the whole model does, and of all steps.
    """

    num_steps: int
    threshold: float
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    expected: Mapping[str, float]

    def __post_init__(self) -> None:
        widths = [len(self.mean), len(self.scale), len(self.weights) - 1]
        if widths != [_NUM_FEATURES] * 3 or self.num_steps < 1:
            raise InputError(
                f"an early exit after {self.num_steps} layers with {len(self.weights)} weights "
                f"over {len(self.mean)} means and {len(self.scale)} scales does not fit the "
                f"{_NUM_FEATURES} features; learn it again"
            )
        numbers = (*self.mean, *self.scale, *self.weights)
        if not all(map(math.isfinite, numbers)) or math.isnan(self.threshold):
            raise InputError(
                f"an early exit after {self.num_steps} layers has a number that is not finite; "
                "learn it again"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a threshold that nothing reaches is None."""
        threshold = self.threshold if math.isfinite(self.threshold) else None
        return {**asdict(self), "threshold": threshold}

    def sureness(self, found: Sequence[ChoiceScores]) -> np.ndarray:
        """How likely all layers choose the same, f64[N]."""
        seen = (np.stack([each.features() for each in found]) - self.mean) * self.scale
        return sigmoid(seen @ self.weights[:-1] + self.weights[-1])

    def leaves(self, found: Sequence[ChoiceScores]) -> np.ndarray:
        """Which of the questions are answered here, bool[N]."""
        return self.sureness(found) >= self.threshold


@dataclass(frozen=True)
class EarlyExits:
    """An exit for each task, of the model whose weights have this fingerprint, in the built-in
    prompt of that name. `notes` are JSON values that say how they were learned.
    """

    tasks: Mapping[str, EarlyExit]
    weights: str
    prompt: str
    notes: Mapping[str, Any] = field(default_factory=dict)

    def check(self, library: "LayerLibrary", prompt: str) -> None:
        """Raise InputError unless they were learned for this model, in this prompt."""
        if self.weights != library.weights_fingerprint:
            raise InputError(
                f"these early exits are for {self.notes.get('model_name', 'another model')} in "
                f"{self.notes.get('dtype', 'another dtype')}, and this model is another one or in "
                f"another dtype ({library.dtype}); load the model that they are for, or learn them "
                "anew (`python -m polar_fx exits`)"
            )
        for task, found in self.tasks.items():
            if found.num_steps >= library.depth:
                raise InputError(
                    f"the early exit of {task} is after {found.num_steps} layers, and this model "
                    f"has {library.depth}; learn it again (`python -m polar_fx exits`)"
                )
        if self.prompt != prompt:
            raise InputError(
                f"these early exits were learned in the prompt {self.prompt!r}, and {prompt!r} is "
                "asked; ask in theirs, or learn them anew"
            )

    def save(self, path: str | Path) -> Path:
        """Write a JSON file. Raises InputError."""
        tasks = {name: found.to_dict() for name, found in self.tasks.items()}
        fields = {"format": FORMAT, "version": VERSION, **asdict(self), "tasks": tasks}
        return write_whole((json.dumps(fields, indent=1) + "\n").encode(), path)

    @classmethod
    def load(cls, path: str | Path) -> "EarlyExits":
        """Read a file that `save` wrote; nothing in it is executed.

        Raises InputError naming the file and what is wrong with it.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT or fields.pop("version") != VERSION:
                raise ValueError(f"it is no {FORMAT} of version {VERSION}")
            tasks = {name: _exit_of(each) for name, each in fields.pop("tasks").items()}
            texts = {name: fields.pop(name) for name in ("weights", "prompt")}
            if not all(isinstance(text, str) for text in texts.values()):
                raise ValueError(f"{texts} should be texts")
            return cls(tasks, **texts, notes=dict(fields.pop("notes")))
        except OSError as error:
            raise InputError(
                f"cannot read {path}: {error.strerror or error}; name the file that "
                "`python -m polar_fx exits` wrote"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} holds no early exits: {error}; name the file that "
                "`python -m polar_fx exits` wrote"
            ) from error


def _exit_of(fields: Mapping[str, Any]) -> EarlyExit:
    numbers = {name: tuple(map(float, fields[name])) for name in ("mean", "scale", "weights")}
    return EarlyExit(
        int(fields["num_steps"]),
        math.inf if fields["threshold"] is None else float(fields["threshold"]),
        **numbers,
        expected=dict(fields["expected"]),
    )

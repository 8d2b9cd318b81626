"""When the first layers are enough: a question with choices is answered after them where they are
sure enough to choose what the whole model would.

After `num_steps` layers the model's own norm and head score the choices. A readout (a conditional
logit over what is seen of each choice: its score and its length) says how likely the whole model
takes each. Where the likeliest reaches the threshold it is the answer; otherwise the other layers
go on from there, so no layer runs twice. Learning needs no answer key: its label is the choice of
the whole model. Exits by confidence are those of CALM (Schuster et al., arXiv 2207.07061), here a
program `0-3` or the identity.

Shape legend: N questions, C choices of a question, F features of a choice.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..output.files import write_whole
from ..questions.choices import best_choice, log_shares

if TYPE_CHECKING:
    from ..library import LayerLibrary
    from ..questions.question import ChoiceKey

FORMAT, VERSION = "polar_fx.early_exits", 2
NUM_FEATURES = 7  # of ChoiceScores.features
_IMPOSSIBLE = 50.0  # nats below the worst choice that is possible


@dataclass(frozen=True)
class ChoiceScores:
    """Of one question by one program: the score of each choice, in nats (nats a character where
    lengths count), what it was divided by, and how many tokens and characters a choice has.
    """

    scores: tuple[float, ...]
    lengths: tuple[float, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]

    @classmethod
    def of(cls, scores: Sequence[float], key: "ChoiceKey") -> "ChoiceScores":
        """Scores of the choices of a key."""
        return cls(tuple(scores), key.lengths, key.scored, key.characters)

    @property
    def best(self) -> int:
        """The place of the choice that is taken."""
        return best_choice(self.scores)

    def features(self) -> np.ndarray:
        """What a readout sees of each choice, f64[C, F], each beside the mean of all choices: the
        log-likelihood, whole, a token and a character, and the two lengths and their logarithms.
        """
        known = np.array(self.scores) * self.lengths
        possible = np.isfinite(known)
        worst = known[possible].min() if possible.any() else 0.0
        known = np.where(possible, known, worst - _IMPOSSIBLE)
        tokens = np.array(self.tokens, dtype=float)
        characters = np.maximum(np.array(self.characters, dtype=float), 1)
        seen = [known, known / tokens, known / characters, tokens, characters]
        seen += [np.log(tokens), np.log(characters)]
        return np.stack([each - each.mean() for each in seen], axis=1)


class Read(NamedTuple):
    """What a readout says of N questions: the `place` of the likeliest choice i64[N], how likely
    the whole model takes that, `sureness` f64[N], and of each question the logarithm of how likely
    it takes each choice.
    """

    place: np.ndarray
    sureness: np.ndarray
    log_shares: list[tuple[float, ...]]


def read(weights: Sequence[float] | np.ndarray, found: Sequence[ChoiceScores]) -> Read:
    """By a readout of weights f64[F]."""
    told = [log_shares((each.features() @ weights).tolist()) for each in found]
    shares = [tuple(each.tolist()) for each in told]
    place = np.array([best_choice(each) for each in shares], dtype=int)
    sure = [math.exp(each[i]) for each, i in zip(shares, place.tolist(), strict=True)]
    return Read(place, np.array(sure), shares)


@dataclass(frozen=True)
class EarlyExit:
    """The exit of one task: after `num_steps` layers, where the readout of these `weights` f64[F]
    reaches `threshold` (infinity: never, and `refused` says why).

    `expected` are shares of the `questions` that bounded the exit, which had no part in choosing
    depth and readout: of questions that leave, of those that choose as the whole model does, of all
    questions whose choice changes and whose right answer is lost (less those gained), and of all
    steps. A file without the number of `questions` is older: its depth and threshold were chosen by
    these shares, so others will be somewhat worse.
    """

    num_steps: int
    threshold: float
    weights: tuple[float, ...]
    expected: Mapping[str, float]
    refused: str = ""

    def __post_init__(self) -> None:
        if len(self.weights) != NUM_FEATURES or self.num_steps < 1:
            raise InputError(
                f"an early exit after {self.num_steps} layers with {len(self.weights)} weights "
                f"does not fit the {NUM_FEATURES} features; learn it again"
            )
        if not all(map(math.isfinite, self.weights)) or math.isnan(self.threshold):
            raise InputError(
                f"an early exit after {self.num_steps} layers has a number that is not finite; "
                "learn it again"
            )
        if self.refused and not self.never:
            raise InputError(
                f"an early exit is refused ({self.refused}) and has the threshold "
                f"{self.threshold:g}; learn it again"
            )

    @property
    def never(self) -> bool:
        """Whether no question leaves here."""
        return math.isinf(self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a threshold that nothing reaches is None."""
        threshold = None if self.never else self.threshold
        return {**asdict(self), "threshold": threshold}

    def read(self, found: Sequence[ChoiceScores]) -> Read:
        """What the readout says of N questions, by their scores at the exit."""
        return read(self.weights, found)

    def answers(self, found: Sequence[ChoiceScores]) -> list[tuple[float, ...] | None]:
        """Of N questions by their scores at the exit: the logarithm of how likely the whole model
        takes each choice, where the question is answered here; None where it goes on.
        """
        told = self.read(found)
        leaves = (told.sureness >= self.threshold).tolist()
        return [each if gone else None for each, gone in zip(told.log_shares, leaves, strict=True)]


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
            if fields.pop("format") != FORMAT:
                raise ValueError(f"it is no {FORMAT}")
            if (version := fields.pop("version")) != VERSION:
                raise InputError(
                    f"{path} is of version {version!r}, and {VERSION} is read here; learn the "
                    "exits again (`python -m polar_fx exits`)"
                )
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
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{path} holds no early exits: {error}; name the file that "
                "`python -m polar_fx exits` wrote"
            ) from error


def _exit_of(fields: Mapping[str, Any]) -> EarlyExit:
    num_steps, threshold, weights = (fields[n] for n in ("num_steps", "threshold", "weights"))
    if type(num_steps) is not int:
        raise ValueError(f"num_steps is {num_steps!r}, not an integer")
    if threshold is not None and not _is_number(threshold):
        raise ValueError(f"threshold is {threshold!r}, neither a finite number nor null")
    if not (isinstance(weights, list) and all(map(_is_number, weights))):
        raise ValueError("weights is no list of finite numbers")
    if not isinstance(refused := fields.get("refused", ""), str):  # older files have none
        raise ValueError(f"refused is {refused!r}, not a text")
    return EarlyExit(
        num_steps,
        math.inf if threshold is None else float(threshold),
        tuple(map(float, weights)),
        expected={str(name): float(value) for name, value in fields["expected"].items()},
        refused=refused,
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]

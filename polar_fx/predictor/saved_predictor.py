"""A predictor as one value, to be loaded, saved and shared."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import InputError
from ..hub import OnTheHub, card
from .policy import Policy
from .saved import (
    FILES,
    load_selector,
    model_of,
    read_model,
    read_notes,
    save_selector,
    trained_for,
)
from .selector import Selector

if TYPE_CHECKING:
    from ..library import LayerLibrary


@dataclass(frozen=True)
class SavedPredictor(OnTheHub):
    """What `train` wrote: `compile(model, predictor=...)` takes it as it takes the folder.

    `selector` gives probabilities, `policy` is the one saved with it, `model` the fingerprint of
    the model that it was trained for, and `notes` say how (JSON values). Only JSON and safetensors
    are read and written; nothing in them is executed.
    """

    selector: Selector
    policy: Policy
    model: str
    notes: Mapping[str, Any] = field(default_factory=dict)

    hub_kind = "predictor"
    hub_files = FILES

    def __repr__(self) -> str:
        programs = f"{len(self.selector.menu)} programs"
        return f"SavedPredictor({model_of(self.notes)}, {programs}, {self.policy})"

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """What `train` wrote there. Raises InputError."""
        selector, policy = load_selector(folder)
        return cls(selector, policy, read_model(folder), read_notes(folder))

    def require_model(self, library: "LayerLibrary") -> None:
        """Raise InputError unless it was trained for this model."""
        # by the weights alone, if they are noted: graphs differ between versions of torch; each of
        # the two fingerprints reads all weights
        known = self.notes.get("weights")
        if known is not None and known == library.weights_fingerprint:
            return
        if self.model == library.model_fingerprint:
            return
        raise InputError(
            f"this predictor was {trained_for(self.notes, self.model)}, and this model is another "
            f"one or in another dtype ({library.dtype}); load the model and dtype that it is for, "
            "or train a predictor for this one"
        )

    @classmethod
    def _read_folder(cls, place: Path, **options: Any) -> Self:
        if options:
            raise InputError(f"a predictor takes no {', '.join(options)}; leave that out")
        return cls.of_folder(place)

    def _write_folder(self, place: Path) -> Path:
        return save_selector(
            self.selector, place, model=self.model, policy=self.policy, notes=self.notes
        )

    def _card(self, about: str) -> str:
        selector = self.selector
        rows = [
            f"| `{program}` | {program.num_steps / selector.depth:.0%} |"
            for program in selector.menu.programs
        ]
        tasks = ", ".join(map(str, self.notes.get("tasks", ()))) or "questions without a name"
        return card(
            f"A predictor of programs of layers for {model_of(self.notes)}",
            tags=("layer-skipping", "dynamic-depth"),
            parts=(
                "It chooses for each input which of these programs of the model's layers runs, by "
                f"the hidden states after the first {selector.features.num_steps} steps. It was "
                f"trained on {tasks}; its policy is `{self.policy}`, and it serves this model in "
                "this dtype alone.",
                "\n".join(("| program | steps |", "|---|---|", *rows)),
                about,
                "```python\nimport polar_fx\n\n"
                'predictor = polar_fx.SavedPredictor.from_pretrained("user/name")\n'
                "compiled = polar_fx.compile(model, predictor=predictor)\n```",
            ),
        )

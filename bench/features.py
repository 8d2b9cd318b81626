"""What an input's features tell about which program answers it: hidden states after 0, 1, 2, 4 ... steps, one menu, one network.

Trains the selector of a predictor again on its own dense labels, with other features and several seeds, and on features of
other questions as a control: what is learned there is noise. Validation questions choose the epoch and scale the
probabilities in one half and are scored in the other.
"""

import argparse
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from measure import RESULTS, machine, write_json
from polar_fx.cli.labelling import Labeller
from polar_fx.cli.questions import templates_of
from polar_fx.predictor.features import Features
from polar_fx.predictor.saved import load_selector, read_notes
from polar_fx.protocol.calibration import fit_platt, log_loss
from polar_fx.search.record_store import RecordReader
from polar_fx.training.selector_training import Labels, SelectorConfig, choose_all, train_selector
from polar_fx.training.verdict_table import VerdictTable


def score(train: Labels, validation: Labels, steps: np.ndarray, depth: int, config: SelectorConfig) -> dict[str, float]:
    """Log loss and accuracy of the likeliest program, on the half of validation that chose nothing."""
    half = np.arange(len(validation.right)) % 2 == 0
    parts = [
        Labels(validation.features[torch.tensor(h)], validation.right[h], validation.log_likelihood[h]) for h in (half, ~half)
    ]  # fmt: skip
    network, _ = train_selector(train, parts[0], config)
    with torch.no_grad():
        logits = [network(p.features).double().numpy() for p in parts]
    chances = fit_platt(logits[0], parts[0].right).apply(logits[1])
    chosen = choose_all(chances, steps, depth, -np.inf)
    return {
        "log_loss": log_loss(chances, parts[1].right),
        "accuracy": float(parts[1].right[np.arange(len(chosen)), chosen].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("predictor", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    selector, _ = load_selector(options.predictor)
    parts = options.predictor / "parts"
    tables = {s: VerdictTable.of(RecordReader(parts / f"{s}.jsonl"), selector.menu.programs) for s in ("train", "validation")}
    questions = [q for t in tables.values() for q in t.questions]
    prompt = read_notes(options.predictor)["prompt"]
    given = SimpleNamespace(model=None, dtype=options.dtype, backend="auto", workers=1)
    labeller = Labeller(given, templates_of(prompt, questions), questions)  # type: ignore[arg-type]
    rows = {s: [(q, labeller.encoded[q.id]) for q in t.questions] for s, t in tables.items()}
    steps, depth = selector.menu.steps, selector.depth
    results: dict[str, Any] = {}

    def labels(split: str, features: torch.Tensor) -> Labels:
        return Labels(features, tables[split].right, tables[split].log_likelihood)

    def run(name: str, features: dict[str, torch.Tensor]) -> None:
        train, validation = (labels(split, features[split]) for split in ("train", "validation"))
        found = [score(train, validation, steps, depth, SelectorConfig(seed=s)) for s in range(options.seeds)]
        results[name] = {
            key: {"mean": statistics.mean(f[key] for f in found), "each": [f[key] for f in found]} for key in found[0]
        }
        mean = {key: value["mean"] for key, value in results[name].items()}
        print(f"{name:34} log loss {mean['log_loss']:.4f}  accuracy {100 * mean['accuracy']:.1f} %")

    for count in options.steps:
        features = {s: labeller.features(rows[s], Features(count, selector.features.window)) for s in rows}
        run("token embeddings" if count == 0 else f"hidden states after {count} steps", features)
        if count == selector.features.num_steps:
            order = {s: torch.randperm(len(f), generator=torch.Generator().manual_seed(1)) for s, f in features.items()}
            run("of other questions (control)", {s: f[order[s]] for s, f in features.items()})
    tasks = [q.task for q in questions]
    names = sorted(set(tasks))
    one_hot = {s: torch.tensor([[float(q.task == n) for n in names] for q in t.questions]) for s, t in tables.items()}
    run("the task's name alone", one_hot)
    held_out = np.arange(len(tables["validation"].right)) % 2 == 1
    rates = tables["train"].right.mean(0).clip(1e-3, 1 - 1e-3)
    right = tables["validation"].right[held_out]
    results["nothing"] = {
        "log_loss": {"mean": log_loss(np.broadcast_to(rates, right.shape), right)},
        "accuracy": {"mean": float(right[:, int(rates.argmax())].mean())},
    }
    results["identity"] = {"accuracy": {"mean": float(right[:, 0].mean())}}
    print(json.dumps({k: results[k] for k in ("nothing", "identity")}))
    write_json(RESULTS / "predictor-features-cpu.json", {
        "machine": machine(torch.device("cpu")), "menu": [str(p) for p in selector.menu.programs], "dtype": options.dtype,
        "questions": {s: len(t.questions) for s, t in tables.items()}, "scored": int(held_out.sum()), "features": results,
    })  # fmt: skip


if __name__ == "__main__":
    main()

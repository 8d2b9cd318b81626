"""What a selector can see of an input, and which remedies help: cross-validation on questions that no menu was mined on.

One menu, its dense labels, five folds of its train and validation questions but for those it was screened on. Varied: the
features (hidden states after more or fewer steps, token embeddings, more of the prompt, another question's features as a
control, the task's name alone), and how the network is trained. Test questions are not touched.
"""

import argparse
import json
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
from polar_fx.protocol.calibration import log_loss
from polar_fx.protocol.paired import compare
from polar_fx.search.record_store import RecordReader
from polar_fx.training.pipeline import MINED
from polar_fx.training.selector_training import Labels, SelectorConfig, choose_all, price_of, train_selector
from polar_fx.training.verdict_table import VerdictTable

_FOLDS, _THRESHOLDS, _BUDGETS = 5, (0.0, 0.02, 0.05), (0.95, 0.9)


def out_of_fold(features: torch.Tensor, table: VerdictTable, config: dict[str, Any], seeds: int = 1) -> np.ndarray:
    """Probabilities f64[N, K] of networks that did not see the question, the mean of `seeds` networks."""
    fold = np.random.default_rng(0).integers(0, _FOLDS, len(table.questions))
    chances = np.zeros(table.right.shape)
    for held_out in range(_FOLDS):
        others = np.flatnonzero(fold != held_out)
        stop, learn = others[::6], np.setdiff1d(others, others[::6])
        parts = [Labels(features[torch.tensor(p)], table.right[p], table.log_likelihood[p]) for p in (learn, stop)]
        asked = features[torch.tensor(np.flatnonzero(fold == held_out))]
        for seed in range(seeds):
            network, _ = train_selector(parts[0], parts[1], SelectorConfig(seed=seed, **config))
            with torch.no_grad():
                chances[fold == held_out] += torch.sigmoid(network(asked)).double().numpy() / seeds
    return chances


def judged(chances: np.ndarray, table: VerdictTable) -> dict[str, Any]:
    """Log loss, and the gain over the identity in points with its interval, by threshold and by budget."""
    rows, right, steps = np.arange(len(chances)), table.right, table.steps
    found: dict[str, Any] = {"log_loss": log_loss(chances.clip(1e-6, 1 - 1e-6), right)}
    choices = {f"threshold {t:g}": choose_all(chances, steps, table.depth, t) for t in _THRESHOLDS}
    for budget in _BUDGETS:
        price = price_of(chances, steps, table.depth, budget)
        if price is not None:
            choices[f"mean steps <= {budget:g}"] = choose_all(chances, steps, table.depth, -np.inf, price)
    strata = [q.task for q in table.questions]
    for name, chosen in choices.items():
        paired = compare(right[rows, chosen], right[:, 0], steps=steps[chosen], identity_steps=float(table.depth), strata=strata)
        found[name] = {**paired.gain.to_dict(), "steps": float(steps[chosen].mean())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictor", type=Path, help="folder of `train`")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    selector, _ = load_selector(options.predictor)
    parts = options.predictor / "parts"
    screened = {r.question.id for r in RecordReader(parts / "screen.jsonl")} | set(json.loads((parts / MINED).read_text()))
    records = [r for s in ("train", "validation") for r in RecordReader(parts / f"{s}.jsonl") if r.question.id not in screened]
    table = VerdictTable.of(records, selector.menu.programs)
    given: Any = SimpleNamespace(model=None, dtype=options.dtype, backend="auto", workers=1)
    labeller = Labeller(given, templates_of(read_notes(options.predictor)["prompt"], table.questions), table.questions)
    rows = [(q, labeller.encoded[q.id]) for q in table.questions]
    trunk, window = selector.features.num_steps, selector.features.window
    seen = {(n, w): labeller.features(rows, Features(n, w)) for n, w in [(0, window), (2, window), (trunk, window), (8, window)]}
    own = seen[trunk, window]
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(1))
    tasks = sorted({q.task for q in table.questions})
    names = torch.tensor([[float(q.task == task) for task in tasks] for q in table.questions])
    variants: dict[str, tuple[torch.Tensor, dict[str, Any], int]] = {
        "token embeddings": (seen[0, window], {}, 1),
        "hidden states after 2 steps": (seen[2, window], {}, 1),
        f"hidden states after {trunk} steps (as trained)": (own, {}, 1),
        "hidden states after 8 steps (the menu shares fewer)": (seen[8, window], {}, 1),
        "last 64 tokens": (labeller.features(rows, Features(trunk, 64)), {}, 1),
        "the task's name alone": (names, {"width": 0, "dropout": 0.0, "learning_rate": 0.01}, 1),
        "another question's features (control)": (own[order], {}, 1),
        "half of the label is the answer's probability": (own, {"likelihood_weight": 0.5}, 1),
        "the label is the answer's probability": (own, {"likelihood_weight": 1.0}, 1),
        "linear, strong weight decay": (own, {"width": 0, "dropout": 0.0, "weight_decay": 1.0, "learning_rate": 3e-4}, 1),
        "mean of 4 networks": (own, {}, 4),
    }
    results = {}
    for name, (features, config, seeds) in variants.items():
        results[name] = judged(out_of_fold(features, table, config, seeds), table)
        gains = {k: v for k, v in results[name].items() if k != "log_loss"}
        shown = ", ".join(f"{k} {v['value']:+.2f} [{v['low']:+.2f}, {v['high']:+.2f}]" for k, v in gains.items())
        print(f"{name}: log loss {results[name]['log_loss']:.4f}; {shown}", flush=True)
    rates = table.right.mean(0)
    best = np.argsort(-rates, kind="stable")[:5]
    nothing = log_loss(np.broadcast_to(rates.clip(1e-4, 1), table.right.shape), table.right)
    write_json(RESULTS / f"selector-variants-cpu-{options.dtype}.json", {
        "benchmark": "selector variants", "dtype": options.dtype, "machine": machine(torch.device("cpu")),
        "questions": len(table.questions), "identity": float(rates[0]), "base_rate_log_loss": nothing,
        "best_static_in_sample": [{"program": str(table.programs[k]), "gain": 100 * float(rates[k] - rates[0])} for k in best],
        "menu": [str(p) for p in table.programs], "variants": results,
    })  # fmt: skip


if __name__ == "__main__":
    main()

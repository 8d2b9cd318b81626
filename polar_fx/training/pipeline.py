"""From search records to a predictor: mine a menu, label it densely, train, calibrate, set
thresholds on validation.

Verdicts are kept in record files of one folder and an interrupted run continues from them;
features are made anew. Test questions are not seen here.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, TrainingError
from ..output.files import made_folder
from ..predictor.features import Features
from ..predictor.known_tasks import KnownTasks
from ..predictor.menu import Menu
from ..predictor.policy import Calibration
from ..predictor.selector import Selector
from ..program import Program
from ..runtime.trunk import check_trunk
from ..search.records.records import SearchRecord
from ..stats.calibration import ece, fit_platt, log_loss, sigmoid
from ..stats.risk import RiskThreshold, least_questions, risk_controlled_threshold
from .mining import BUDGETS, best_static, candidates, edits_as_programs, finalists, mine, variations
from .selector_training import Labels, SelectorConfig, choose_all, price_of, train_selector
from .verdict_table import Rows, VerdictTable


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run. Raises InputError on a value out of range.

    `menu_size` programs, the identity among them, out of `num_candidates` that searches found,
    `num_edits` single edits and `num_variations` of the best of these, all tried on
    `screen_questions` train questions, and the best `num_finalists` of them on `final_questions`
    more. `risk` is the accuracy that leaving the identity may lose at most (a share of questions),
    at confidence 1 - `delta` on validation.
    """

    features: Features = Features()  # noqa: RUF009
    menu_size: int = 32
    num_candidates: int = 96
    num_edits: int = 128
    num_variations: int = 64
    screen_questions: int = 250
    num_finalists: int = 64
    final_questions: int = 750
    budgets: tuple[float, ...] = tuple(f for f in BUDGETS if f < 1)
    risk: float = 0.01
    delta: float = 0.05
    selector: SelectorConfig = field(default_factory=SelectorConfig)

    def __post_init__(self) -> None:
        least_of = {
            "menu_size": 2,
            "num_candidates": 0,
            "num_edits": 0,
            "num_variations": 0,
            "screen_questions": 1,
        }
        for name, least in {**least_of, "num_finalists": 1, "final_questions": 0}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; give at least {least}")
        if not all(0 < f < 1 for f in self.budgets):
            raise InputError(
                f"budgets are {self.budgets}; give fractions of the identity's steps between 0 "
                "and 1"
            )


_STARTS = 4  # of the sequences of thresholds that are tested

MINED = "mined.json"
"""In the folder of parts: the ids of the questions whose records the menu was mined from."""

# dense(name, rows, programs): a table of every program on every question, kept under that name.
Dense = Callable[[str, Rows, Sequence[Program]], VerdictTable]


def mine_menu(
    records: Sequence[SearchRecord],
    train: Rows,
    *,
    dense: Dense,
    depth: int,
    config: TrainingConfig,
    runs: Callable[[Program], bool] | None = None,
) -> VerdictTable:
    """Screen programs and try the best again; the table's programs in `mine`'s order are the menu.

    What a single question's search found, and single edits, run on some questions, then variations
    of the best of them, and the best of all on further questions, because what came first among
    many has been lucky. Programs that the model does not run (`runs`) are left out. Raises
    InputError if there is nothing to screen.
    """
    num_steps = config.features.num_steps
    pool = [
        *candidates(records, num_steps, count=config.num_candidates),
        *edits_as_programs(depth, num_steps)[: config.num_edits],
    ]
    if runs is not None:
        pool = list(filter(runs, pool))
    if not pool:
        raise InputError(
            "there is no program to screen: the records hold none that fits, and num_edits is 0; "
            "allow some edits"
        )
    # shuffled, because rows are ordered by task and cycle through its cells
    order = np.random.default_rng(config.selector.seed).permutation(len(train))
    first, second = config.screen_questions, config.screen_questions + config.final_questions
    screened = [train[i] for i in sorted(order[:first])]
    table = dense("screen", screened, list(dict.fromkeys(pool)))
    if config.num_variations and (
        more := variations(table, num_steps, count=config.num_variations)
    ):
        table = table.beside(dense("variations", screened, more))
    if others := [train[i] for i in sorted(order[first:second])]:
        best = finalists(table, config.num_finalists)
        table = table.choose(best).above(dense("finalists", others, best))
    return table


def fit(
    menu: Menu,
    train: Labels,
    *,
    validation: Labels,
    config: TrainingConfig,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Selector, dict[str, Any]]:
    """A calibrated selector, and what was measured on validation.

    Half of the validation questions choose the epoch and scale the probabilities, the others set
    thresholds and prices: what chose the predictor cannot certify it. Where the labels are of
    several tasks, each task has a threshold, and these hold together at 1 - delta. Raises
    InputError for labels that nothing can be learned from.
    """
    fitting, setting = _halves(validation, config.selector.seed)
    network, history = train_selector(train, fitting, config=config.selector, progress=progress)
    with torch.no_grad():
        logits = network(fitting.features).double().numpy()
        others = network(setting.features).double().numpy()
    scaling = fit_platt(logits, fitting.right)
    slopes, shifts = (
        torch.full((len(menu),), value) for value in (scaling.slope, scaling.intercept)
    )
    selector = Selector(
        menu,
        config.features,
        network=network,
        calibration=None,
        slopes=slopes,
        shifts=shifts,
    )
    chances = selector.probabilities(setting.features)
    before = sigmoid(others)
    if len(set(train.tasks)) > 1:
        selector.tasks = KnownTasks.learn(
            train.features, train.tasks, others=fitting.features, tasks_of_others=fitting.tasks
        )
    bound, by_task = _thresholds(selector, setting, config=config)
    prices = {f: price_of(chances, menu.steps, depth=menu.depth, budget=f) for f in config.budgets}
    set_prices = {f: price for f, price in prices.items() if price is not None}
    taus = {name: found.tau for name, found in by_task.items()}
    selector.calibration = Calibration(bound.tau, set_prices, taus)
    by_task_as_json = {name: found.to_dict() for name, found in by_task.items()}
    measured = {
        "training": history,
        "scaling": scaling.to_dict(),
        "ece": {"before": ece(before, setting.right), "after": ece(chances, setting.right)},
        "log_loss": {
            "base_rates": log_loss(
                np.broadcast_to(train.right.mean(0).clip(1e-3, 1 - 1e-3), chances.shape),
                setting.right,
            ),
            "before": log_loss(before, setting.right),
            "after": log_loss(chances, setting.right),
        },
        "threshold": bound.to_dict(),
        "threshold_by_task": by_task_as_json,
        "budgets_out_of_reach": sorted(set(prices) - set(set_prices), reverse=True),
        "validation": _accuracies(selector, setting, train=train),
    }
    return selector, measured


def _thresholds(
    selector: Selector, setting: Labels, *, config: TrainingConfig
) -> tuple[RiskThreshold, dict[str, RiskThreshold]]:
    """That of all questions together, and those of each task that is told from others."""
    menu, chances = selector.menu, selector.probabilities(setting.features)
    best = choose_all(chances, menu.steps, depth=menu.depth, threshold=-np.inf)
    rows = np.arange(len(best))
    gains, right = chances[rows, best] - chances[:, 0], setting.right[rows, best]

    def bound_of(places: np.ndarray, delta: float) -> RiskThreshold:
        return risk_controlled_threshold(
            gains[places],
            right[places],
            identity_right=setting.right[places, 0],
            epsilon=config.risk,
            delta=delta,
            starts=_STARTS,
        )

    by_task: dict[str, RiskThreshold] = {}
    if selector.tasks is not None:
        known = np.array(selector.tasks.recognized(setting.features))
        names = selector.tasks.names
        for name in names:
            if len(places := np.flatnonzero(known == name)):
                by_task[name] = bound_of(places, config.delta / len(names))
    return bound_of(rows, config.delta), by_task


def too_few_to_certify(tasks: Sequence[str], config: TrainingConfig) -> str:
    """What so few validation questions mean for the policy `accuracy`; empty if they may do.

    `tasks` are those of the validation questions, one each. Several tasks share `config.delta`, so
    that each needs more questions than one alone.
    """
    counted = Counter(tasks)
    delta = config.delta / max(1, len(counted))
    least = 2 * least_questions(config.risk, delta, starts=_STARTS)
    few = [f"{task} ({number})" for task, number in counted.items() if number < least]
    if not few:
        return ""
    asked = f"{len(tasks)} validation questions"
    if len(counted) > 1:
        asked = f"validation questions of {', '.join(few)}"
    return (
        f"{asked} are too few to certify that leaving the identity loses "
        f"at most {100 * config.risk:g} % of the answers, which takes {least}"
        f"{' of each task' if len(counted) > 1 else ''} even if it loses none: unless it gains "
        "clearly, the policy 'accuracy' will always run the identity there; ask more questions, "
        "allow a larger risk, or use a policy such as mean_steps<=0.9, which promises nothing "
        "about accuracy"
    )


def _halves(labels: Labels, seed: int) -> tuple[Labels, Labels]:
    """Half of the rows, drawn, and the others. Raises TrainingError for fewer than two."""
    if len(labels.right) < 2:
        raise TrainingError(
            "validation takes at least 2 questions, half of them to fit and half to set "
            "thresholds; ask more"
        )
    order = np.random.default_rng(seed).permutation(len(labels.right))
    parts = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    return labels.at(parts[0]), labels.at(parts[1])


def _accuracies(selector: Selector, validation: Labels, *, train: Labels) -> dict[str, Any]:
    """Accuracy and mean steps on validation, which chose thresholds and prices: not an estimate of
    what tests will give.
    """
    menu, right = selector.menu, validation.right
    chances, rows = selector.probabilities(validation.features), np.arange(len(right))

    def of(chosen: np.ndarray) -> dict[str, float]:
        return {
            "accuracy": float(right[rows, chosen].mean()),
            "steps": float(menu.steps[chosen].mean()),
        }

    steps, depth, calibration = menu.steps, menu.depth, selector.calibration
    proposals = selector.proposals(validation.features)
    least = np.array([calibration.threshold_for(proposal.task) for proposal in proposals])
    static = int(train.right.mean(0).argmax())
    return {
        "identity": of(np.zeros(len(rows), int)),
        "best_static_of_train": {
            **of(np.full(len(rows), static)),
            "program": str(menu.programs[static]),
        },
        "likeliest": of(choose_all(chances, steps, depth=depth, threshold=-np.inf)),
        "accuracy": of(choose_all(chances, steps, depth=depth, threshold=least)),
        **{
            f"mean_steps<={f:g}": of(
                choose_all(chances, steps, depth=depth, threshold=-np.inf, price=p)
            )
            for f, p in calibration.prices.items()
        },
        "oracle": {"accuracy": float(right.any(1).mean())},
    }


def labels_of(table: VerdictTable, features: Tensor) -> Labels:
    """The table's verdicts beside features f32[N, F] of the same questions."""
    tasks = [question.task for question in table.questions]
    return Labels(features, table.right, table.log_likelihood, tasks)


def train_predictor(
    records: Sequence[SearchRecord],
    train: Rows,
    *,
    validation: Rows,
    dense: Dense,
    features_of: Callable[[Rows], Tensor],
    depth: int,
    config: TrainingConfig,
    programs: Sequence[Program] = (),
    progress: Callable[[int, dict[str, float]], None] | None = None,
    runs: Callable[[Program], bool] | None = None,
) -> tuple[Selector, dict[str, Any]]:
    """The whole way.

    `features_of(rows)` gives pooled features f32[N, F]. With `programs` the menu is these, after
    the identity, and nothing is mined; else only those that the model runs (`runs`) are looked at.
    Returns the selector and the results. Raises InputError, and ProgramError for a program that
    does not begin with the trunk.
    """
    if not train or not validation:
        raise TrainingError(
            f"{len(train)} train and {len(validation)} validation questions; both are needed"
        )
    if programs:
        for program in programs:
            check_trunk(program, config.features.num_steps)
        menu, mined = Menu.of(programs, depth), {}
    else:
        screened = mine_menu(records, train, dense=dense, depth=depth, config=config, runs=runs)
        menu = Menu.of(mine(screened, config.menu_size), depth)
        mined = {"screened": len(screened.questions), "finalists": len(screened.programs)}
    splits = {"train": train, "validation": validation}
    tables = {name: dense(name, rows, menu.programs) for name, rows in splits.items()}
    parts = {name: labels_of(tables[name], features_of(rows)) for name, rows in splits.items()}
    selector, measured = fit(
        menu, parts["train"], validation=parts["validation"], config=config, progress=progress
    )
    return selector, {
        "menu": _menu_rows(menu, tables["train"], validation=tables["validation"]),
        "best_static": str(best_static(tables["train"])),
        "questions": {
            "train": len(train),
            "validation": len(validation),
            "screened": mined.get("screened", 0),
        },
        "finalists": mined.get("finalists", 0),
        "config": {
            **asdict(config),
            "features": asdict(config.features),
            "selector": asdict(config.selector),
        },
        **measured,
    }


def _menu_rows(
    menu: Menu, train: VerdictTable, *, validation: VerdictTable
) -> list[Mapping[str, Any]]:
    return [
        {
            "program": str(p),
            "steps": p.num_steps,
            "train": float(train.right[:, k].mean()),
            "validation": float(validation.right[:, k].mean()),
        }
        for k, p in enumerate(menu.programs)
    ]


def folder_of(out: Path) -> Path:
    """Where the parts of a run are kept, made if it is not there. Raises InputError."""
    return made_folder(out / "parts")

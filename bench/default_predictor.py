"""Make the predictor in the box: `polar_fx/predictor/default`, for SmolLM2-135M-Instruct in
bfloat16.

Trains on train questions of five built-in tasks, sets thresholds on validation questions, then asks
test questions once, and writes the predictor with what was measured. Goes on where an interrupted
run ended; labels stay in --work.

The menu was mined before, in the run that docs/results/dispatch-cpu.md tells of, out of search
records of train questions (bench/results/train-cpu-bfloat16.json has its 24 programs). Of those,
the first six that `mine` takes on the verdicts of 2,273 train questions are here, and the shortest
one, for budgets.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from measure import machine
from polar_fx.jobs import evaluate, train
from polar_fx.jobs.questions import Asked
from polar_fx.models import DEFAULT_NAME
from polar_fx.predictor.saved import load_selector, read_notes, save_selector
from polar_fx.predictor.shipped import DTYPE, FOLDER
from polar_fx.search.workers import Workplace

TASKS = ("addition", "subtraction", "multiplication", "word-problems", "sequences")
MENU = (
    "0-17 (18)*2@0.5 19-29",
    "0-13 (14)*2@0.5 15-16 (17-18)*2@0.5 19-29",
    "0-12 (13)*2@0.5 14-20 (21-23)*2@0.5 24-29",
    "0-11 (12-14)*2@0.5 15-16 (17-18)*2@0.5 19-29",
    "0-27",
    "0-25 27-29",
    "0-3 19-29",
)
# Half of the validation questions set thresholds: 500 of each task.
TRAIN, VALIDATION, TEST, TEST_SEED = 2500, 5000, 5000, 5
# Tasks that nothing was trained on, and how many of their questions are asked too.
OTHERS, OTHERS_TEST = ("division", "comparison"), 1600
# Its threshold is certified for each task; a budget of steps promises nothing of one task.
POLICY = "accuracy"


def main() -> None:
    """Parse the command line and make it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/default-predictor"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    console = Console()
    workplace = Workplace(dtype=DTYPE)
    predictor = options.work / "predictor"
    trained = train.run(
        train.TrainJob(
            out=predictor,
            programs=MENU,
            asked=Asked(tasks=TASKS, count=TRAIN),
            validation_count=VALIDATION,
            policy=POLICY,
            workplace=workplace,
            workers=options.workers,
        ),
        console,
    )
    tested = []
    for name, tasks, num_questions in (("report", TASKS, TEST), ("others", OTHERS, OTHERS_TEST)):
        job = evaluate.EvaluateJob(
            predictor=predictor,
            out=options.work / name,
            asked=Asked(tasks=tasks, count=num_questions, seed=TEST_SEED),
            answers=0,
            baselines=False,
            workplace=workplace,
            workers=options.workers,
        )
        evaluate.run(job, console)
        tested.append(json.loads((job.out / "results.json").read_text()))
    write(predictor, FOLDER, trained=trained, tested=tested[0], others=tested[1])
    console.print(f"wrote {FOLDER}")


def write(
    predictor: Path,
    folder: Path,
    *,
    trained: dict[str, Any],
    tested: dict[str, Any],
    others: dict[str, Any],
) -> None:
    """The trained predictor, with notes of how it was made and what its tests measured, `others` on
    tasks it was not trained on.
    """
    import polar_fx

    selector, policy = load_selector(predictor)
    library = polar_fx.compile(dtype=DTYPE, backend="eager").library
    told = machine(library.device)
    arms = [arm_of(row) for row in tested["arms"] if not row["oracle"]]
    arm = f"selector: {policy_name(str(policy))}"
    notes = {
        **read_notes(predictor),
        "model_name": DEFAULT_NAME,
        "dtype": DTYPE,
        "weights": library.weights_fingerprint,
        "made": {
            "by": "bench/default_predictor.py",
            "date": date.today().isoformat(),
            "machine": {name: told[name] for name in ("cpu", "cores", "torch", "transformers")},
            "questions": trained["questions"],
            "validation": trained["validation"],
            "threshold": trained["threshold"],
            "threshold_by_task": trained["threshold_by_task"],
        },
        "test": {
            "questions": tested["questions"],
            "seed": TEST_SEED,
            "interval": "paired bootstrap, 95 %",
            "arms": arms,
            "rows": rows_of(tested["arms"], arm),
            "untrained": rows_of(others["arms"], arm),
        },
    }
    # whether the model is the one is told by its weights, in any version of torch
    save_selector(selector, folder, model=trained["model"], policy=policy, notes=notes)


def policy_name(policy: str) -> str:
    """As evaluation reports name it."""
    return policy.replace("mean_steps<=", "mean steps <= ").replace("steps<=", "steps <= ")


def arm_of(row: dict[str, Any]) -> dict[str, Any]:
    """A method on a task, in per cent and points."""
    return {
        "arm": row["arm"],
        "task": row["task"],
        "n": row["n"],
        "accuracy": 100 * row["method"]["share"],
        "identity": 100 * row["identity"]["share"],
        "gain": row["gain"],
        "steps": 100 * row["step_ratio"]["value"],
    }


def rows_of(arms: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Of the saved policy, all tasks together and each."""
    return [arm_of(row) for row in arms if row["arm"] == name]


if __name__ == "__main__":
    main()

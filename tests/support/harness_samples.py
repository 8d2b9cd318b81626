"""Programs of a tiny model, and lm-eval's requests to it; only the functions need lm-eval."""

from typing import Any

from polar_fx.program import Program

DEPTH, LENGTH = 6, 63


PROGRAMS = [Program.parse(text, DEPTH) for text in ("skip 3", "repeat 4", "0-1 (2-3)*2@0.5 4-5")]


def requests_of(kind: str, arguments: list[tuple[Any, ...]], *, task: str = "t") -> list[Any]:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return [Instance(kind, {}, args, 0, (task, i, 1)) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


def scores_of(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)


def texts_of(lm: Any, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return lm.generate_until(requests_of("generate_until", asked), disable_tqdm=True)


def programs_run(lm: Any) -> dict[str, int]:
    return {row["program"]: row["requests"] for row in lm.report()["tasks"]["t"]["programs"]}


def evaluate_tasks(lm: Any, *tasks: dict[str, Any], **options: Any) -> Any:
    """The results of tasks; lm-eval's own are not looked through."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    options |= {
        "bootstrap_iters": 0,
        "task_manager": TaskManager(include_defaults=False),
        "log_samples": True,
    }
    return simple_evaluate(lm, tasks=list(tasks), **options)

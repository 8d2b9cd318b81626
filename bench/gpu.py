"""What polar_fx does on a GPU, in one command and a few minutes: what is right, and what it costs.

    python bench/gpu.py --budget 540  # everything, nine minutes of one H100 or H200
    python bench/gpu.py --budget 150 --stages speed --models qwen2.5-3b
    # does the benchmark itself work? tiny models, no GPU
    python bench/gpu.py --tiny --device cpu --budget 120

Workers, a process each, prepare side by side (import, capture, compile); from `--go` of the budget
at the latest, each has the machine alone to be timed, the most valuable first. Results are written
line by line, so that a run cut short keeps what it had: OUT/results.jsonl, and at the end
OUT/summary.txt and OUT/log.txt. docs/gpu.md says what the numbers mean.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_results
from gpu_shapes import PARTS, SHAPES, TINY_MODELS, parts_of, that_fit
from gpu_team import Team

RESULTS = Path(__file__).parent / "results" / "gpu"
# What is done, the most valuable first.
CHECKS = ("correct", "search", "aoti", "bundle", "tests")
STAGES = (*CHECKS, *PARTS, "micro")
# which take minutes on two cores
TINY_STAGES = tuple(stage for stage in STAGES if stage not in ("aoti", "bundle", "tests"))
FAMILIES = (
    ("llama", "qwen2", "phi3", "gemma2"),
    ("qwen2_moe", "mistral", "olmo2"),
    ("gemma3_text", "qwen3", "gpt2"),
)
# Seconds, at most, a worker may take: checks in all, the others for their turn on the machine. What
# is done by then counts.
_LIMITS = {
    "environment": 75.0,
    "correct": 200.0,
    "search": 90.0,
    "files": 240.0,
    "tests": 150.0,
    "micro": 45.0,
    "model": 75.0,
}
_TRIAL = 3.0  # times that long with --tiny: it runs on slow machines


@dataclass(frozen=True)
class Job:
    """One worker: what it does, and for how many seconds at most; `timed` ones wait for their
    turn.
    """

    name: str
    work: tuple[str, ...]
    limit: float
    timed: bool = False


def plan(stages: Sequence[str], models: Sequence[str], *, tiny: bool) -> list[Job]:
    """The workers that a run needs, the most valuable first; without the environment's, which runs
    before them.
    """
    scale = _TRIAL if tiny else 1.0
    groups = (("llama", "gpt2"),) if tiny else FAMILIES
    jobs = []
    if "correct" in stages:
        jobs += [
            Job(f"correct-{i}", (f"correct:{','.join(g)}",), _LIMITS["correct"] * scale)
            for i, g in enumerate(groups, 1)
        ]
    for name, wanted in (
        ("search", ("search",)),
        ("files", ("aoti", "bundle")),
        ("tests", ("tests",)),
    ):
        if work := tuple(stage for stage in wanted if stage in stages):
            jobs.append(Job(name, work, _LIMITS[name] * scale))
    if tiny and jobs:  # there are few cores: one process imports torch once
        together = tuple(each for job in jobs for each in job.work)
        jobs = [Job("checks", together, sum(job.limit for job in jobs))]
    needed = [m for m in models if set(parts_of(m, tiny)) & set(stages)]
    jobs += [Job(m, (f"model:{m}",), _LIMITS["model"] * scale, timed=True) for m in needed]
    if "micro" in stages:
        jobs.append(Job("micro", ("micro",), _LIMITS["micro"] * scale, timed=True))
    return jobs


# --------------------------------------------------------------------------------------- one worker


def work(given: dict[str, Any]) -> None:
    """One worker, by what the coordinator wrote for it."""
    import torch

    from gpu_worker import Worker

    worker = Worker(
        given["name"],
        Path(given["out"]),
        torch.device(given["device"]),
        given["tiny"],
        given["started"],
        given["until"],
        Path(given["turns"]),
    )
    kind, _, name = given["work"][0].partition(":")
    with worker.attempt(kind, **({"model": name} if kind == "model" else {})):
        if kind == "model":
            from gpu_models import run_model

            run_model(worker, name, stages=given["stages"])
        elif kind in ("environment", "micro"):
            import gpu_micro

            getattr(gpu_micro, kind)(worker)
        else:
            from gpu_checks import run_checks

            run_checks(worker, given["work"])


# -------------------------------------------------------------------------------------- all of them


def coordinate(options: argparse.Namespace, out: Path) -> None:
    """Start the workers, give them their turns, end those whose time is up; write the summary
    whatever happens.
    """
    started = time.time()
    end, go = started + options.budget, started + options.go * options.budget
    with tempfile.TemporaryDirectory(prefix="polar_fx-gpu-") as scratch:
        team = Team(out, Path(scratch), started=started)

        def start(job: Job, until: float) -> None:
            given = {
                **asdict(job),
                "out": str(out),
                "device": options.device,
                "tiny": options.tiny,
                "stages": options.stages,
                "started": started,
                "until": until,
                "turns": scratch,
            }
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(given)]
            team.start(job.name, command, limit=until if not job.timed else end)

        try:
            limit = _LIMITS["environment"] * (_TRIAL if options.tiny else 1)
            start(Job("environment", ("environment",), limit), min(go, started + limit))
            team.wait_until(lambda: not team.is_running("environment"), time.time() + limit)
            team.stop("environment")
            jobs = plan(options.stages, _chosen_models(options, team), tiny=options.tiny)
            for job in jobs:
                start(job, go if job.timed else min(go, time.time() + job.limit))
            checks = [job.name for job in jobs if not job.timed]
            timed = [job for job in jobs if job.timed]
            waited_for = [job.name for job in timed]
            team.wait_until(
                lambda: (
                    not any(map(team.is_running, checks)) and all(map(team.is_settled, waited_for))
                ),
                go,
            )
            for name in checks:
                team.stop(name)
            team.say(
                "go",
                ready=[job.name for job in timed if team.is_ready(job.name)],
                after_s=round(time.time() - started, 1),
            )
            _give_turns(team, timed, end=end)
        finally:
            team.stop_all()
            text = gpu_results.summary(gpu_results.read(out / "results.jsonl"))
            (out / "summary.txt").write_text(text, encoding="utf-8")
            (out / "log.txt").write_text(team.logs(), encoding="utf-8")
    print(text)


def _chosen_models(options: argparse.Namespace, team: Team) -> list[str]:
    """The models asked for; of all of them those that fit the card together."""
    if options.models is not None:
        return options.models
    if options.tiny:
        return list(TINY_MODELS)
    gib = next(
        (
            line["gib"]
            for line in gpu_results.read(team.out / "results.jsonl")
            if line["stage"] == "env"
        ),
        0,
    )
    chosen = that_fit(SHAPES, gib)
    if left := [name for name in SHAPES if name not in chosen]:
        team.say(
            "left-out",
            models=left,
            reason=f"all models side by side need more than {gib} GiB; name some with --models",
        )
    return chosen


def _give_turns(team: Team, timed: Sequence[Job], *, end: float) -> None:
    """Each worker the machine alone, in order; those that still prepare come last."""
    waiting = sorted(timed, key=lambda job: not team.is_ready(job.name))
    for i, job in enumerate(waiting):
        now = time.time()
        share = 1.3 * (end - now) / (len(waiting) - i)  # most take less than an even share
        until = min(end, now + min(job.limit, share))
        team.wait_until(lambda name=job.name: team.is_settled(name), until)
        if team.is_ready(job.name) and time.time() < end - 2:
            team.give_turn(job.name, until - 1)
            team.wait_until(
                lambda name=job.name: team.is_done(name) or not team.is_running(name), until + 3
            )
        if team.is_done(job.name):
            team.wait_until(lambda name=job.name: not team.is_running(name), time.time() + 5)
        team.stop(job.name)


# ---------------------------------------------------------------------------------------- arguments


def _names(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    """A type of argument: comma-separated names, all of them known; given back in the order of
    `known`.
    """

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(known)}"
            )
        if not names:
            raise argparse.ArgumentTypeError(f"no {what} is named; known: {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def _between(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"{text!r} is no number between {low:g} and {high:g}")
        return value

    return parse


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with what is wrong and what would be right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget",
        type=_between(1, 86400),
        default=540.0,
        help="seconds for everything (default: 540)",
    )
    parser.add_argument(
        "--go",
        type=_between(0, 1),
        default=0.47,
        help="share of them for preparation, at most (default: 0.47)",
    )
    parser.add_argument(
        "--stages", type=_names(STAGES, "stage"), help=f"of {','.join(STAGES)} (default: all)"
    )
    parser.add_argument(
        "--models",
        type=_names([*SHAPES], "model"),
        help=f"of {','.join(SHAPES)} (default: all that fit)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="models of a few thousand weights, nearly nothing compiled: a trial",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of results (default: bench/results/gpu/<date>-<card>)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.stages = options.stages or list(TINY_STAGES if options.tiny else STAGES)
    if options.worker is None:
        if options.device == "cpu" and not options.tiny:
            parser.error("--device cpu needs --tiny: the models have up to 14 billion weights")
        if options.out is not None and (options.out / "results.jsonl").exists():
            parser.error(
                f"{options.out} holds the results of another run; name another folder with --out"
            )
        options.card = "cpu" if options.device == "cpu" else _card(parser)
    return options


def _card(parser: argparse.ArgumentParser) -> str:
    """The GPU's name, fit for a folder's."""
    import torch

    if not torch.cuda.is_available():
        parser.error(
            f"--device cuda: torch {torch.__version__} finds no CUDA device; install a CUDA build "
            "of torch (pytorch.org) on a machine with an NVIDIA driver (see nvidia-smi), or try "
            "the benchmark with --tiny --device cpu"
        )
    return "-".join(torch.cuda.get_device_name().lower().replace("nvidia", "").split())


def results_folder(parent: Path, date: str, *, card: str) -> Path:
    """A folder of that date and card that holds nothing yet."""
    names = (f"{date}-{card}" + (f"-{i}" if i > 1 else "") for i in range(1, 1000))
    return next(parent / name for name in names if not (parent / name).exists())


def main() -> None:
    options = parse_arguments()
    if options.worker is not None:
        work(json.loads(options.worker))
        return
    # so that workers are ended and the summary is written
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = options.out or results_folder(
        RESULTS, time.strftime("%Y-%m-%d", time.gmtime()), card=options.card
    )
    out.mkdir(parents=True, exist_ok=True)
    print(f"results: {out}", file=sys.stderr)
    coordinate(options, out)


if __name__ == "__main__":
    main()

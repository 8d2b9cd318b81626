"""`tables.md` and `results.json` of a reproduction: what came of it, what was run, and every
table.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ..environment import processor_name, running_facts
from ..evaluation.baselines import LEFT_OUT
from ..evaluation.choices import ANY_OF_MENU, FIRST_OF_BEAM, POLAR_NETWORK, SELECTOR_ACCURACY
from ..output.files import replace_file
from ..search.analysis.summary import SearchFile, analyze
from ..stats.arms import IDENTITY
from ..stats.intervals import share_text
from ..stats.tables import markdown_lines
from .reproduction_plan import Plan

_TOGETHER = "all"


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """What the stages left: the plan, seconds a stage, the results of training, what the evaluation
    came to, the records of the search and the folder of the evaluation's report (None: nothing was
    tested).

    `questions` are facts of files (None: of built-in tasks), `without_baselines` says why they were
    left out, if they were.
    """

    plan: Plan
    seconds: Mapping[str, float]
    trained: Mapping[str, Any]
    conclusion: str
    records: Path
    report: Path | None
    questions: Mapping[str, Any] | None
    without_baselines: str
    figures: bool


def write_tables(out: Path, found: Reproduced) -> list[Path]:
    """Write both, and figures of the search; returns all files, the tables first.

    Raises InputError, RecordFileError, OSError.
    """
    searched = analyze([SearchFile.read(found.records)])
    tested: dict[str, Any] = {}
    figures: list[Path] = []
    if found.report is not None:
        tested = json.loads((found.report / "results.json").read_text(encoding="utf-8"))
        figures = sorted(found.report.glob("*.svg"))
    if found.figures:
        from ..search.analysis.figures import write_figures

        figures += write_figures(searched, out / "figures")
    facts = environment_facts(found.plan.settings)
    results = {
        "ok": True,
        "conclusion": found.conclusion,
        "environment": facts,
        "plan": found.plan.to_dict(),
        "seconds": dict(found.seconds),
        "questions": found.questions,
        "without_baselines": found.without_baselines,
        "search": searched,
        "train": dict(found.trained),
        "test": tested or None,
    }
    text = json.dumps(results, indent=1, allow_nan=False)
    replace_file(out / "results.json", [text.encode() + b"\n"])
    parts = [
        _head(found, facts),
        _questions(found),
        _search(searched["files"][0]),
        "" if found.report is None else _test(found, tested, report=found.report),
        _figures(figures, out=out),
    ]
    replace_file(out / "tables.md", ["\n".join(part for part in parts if part).encode()])
    return [out / "tables.md", out / "results.json", *figures]


def environment_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and machine, as JSON values."""
    import torch

    facts = {
        **running_facts(("torch", "transformers")),
        "date": date.today().isoformat(),
        "processor": processor_name(),
    }
    device = str(settings["device"] or "cpu")
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _head(found: Reproduced, facts: Mapping[str, Any]) -> str:
    settings = found.plan.settings
    *lines, verdict = found.conclusion.splitlines()
    shown = {name: value for name, value in settings.items() if value not in (None, [], 0)}
    shown["questions"] = shown["questions"] if isinstance(shown["questions"], list) else "of files"
    run = [(name, _text(value)) for name, value in {**shown, **facts}.items()]
    planned, took = found.plan.seconds, found.seconds
    stages = [
        (name, _minutes(planned.get(name)), _minutes(took.get(name)))
        for name in dict.fromkeys((*planned, *took))
    ]
    stages.append((_TOGETHER, _minutes(found.plan.total), _minutes(sum(took.values()))))
    return "\n".join(
        [
            f"# {settings['model']}, protocol {settings['protocol']}",
            "",
            f"**{verdict}**",
            "",
            *map(_item, lines),
            "",
            "## What was run",
            "",
            *markdown_lines(("", ""), run),
            "",
            "```",
            *found.plan.lines(),
            "```",
            "",
            "Minutes that were planned and taken; the menu is chosen within the stage train.",
            "",
            *markdown_lines(("stage", "planned", "took"), stages, right=2),
            "",
        ]
    )


def _questions(found: Reproduced) -> str:
    """Of files: how many of each tier, and what was left out."""
    facts = found.questions
    if facts is None:
        asked = "Test questions were asked once, after all that was learned."
        if found.report is None:
            asked = "No test question was asked."
        return (
            "Questions are generated; train, validation and test are apart by a hash of the "
            f"question's id. {asked}\n"
        )
    rows = [(tier, *map(str, counts.values())) for tier, counts in facts["tiers"].items()]
    lines = [
        "## Questions",
        "",
        *markdown_lines(("", "train", "validation", "test"), rows, right=3),
        "",
    ]
    lines.append(
        f"Of {facts['ids_to_leave_out']:,} ids to leave out, {facts['left_out']:,} were of train "
        f"questions, which entered neither search nor training. {facts['repeated']:,} more train "
        "questions were left out because their text is that of a validation or test question."
    )
    if facts["is_divided"]:
        lines.append(
            "The files name no test questions: half of the validation questions of each tier, "
            "drawn, were kept for the test."
        )
    lines.append("How many of these were used, the plan says.")
    return "\n".join([*lines, ""])


def _search(file: Mapping[str, Any]) -> str:
    """What some explored program answers: by task or tier, and of all."""
    groups = [g for g in file["groups"] if g["difficulty"] is None and g["cell"] is None]
    parts = [(g["task"], g["summary"]) for g in groups]
    if len(parts) > 1:
        parts.insert(0, (_TOGETHER, file["summary"]))
    right = []
    shorter = []
    for name, one in parts:
        n = f"{one['questions']:,}"
        right.append((name, n, *map(share_text, one["accuracy"].values())))
        shorter.append((name, *_of_shorter(one["shorter"]), _mean(one["shortest_steps"]["mean"])))
    heads = ("", "n", "identity", "+ skips", "+ repeats", "+ any")
    more = ("", "n right", "shorter", "n wrong", "corrected", "by shorter", "steps of the shortest")
    return "\n".join(
        [
            "## What the search found",
            "",
            f"Train questions, {file['depth']} layers, {file['method']}, {file['simulations']} "
            "programs each. In %, with Wilson's 95 % interval: the identity, and an oracle over "
            "explored programs that only skip, that only repeat, and any, which knows the answer.",
            "",
            *markdown_lines(heads, right, right=5),
            "",
            "Of the questions that the identity gets right, those with a right program that is "
            "shorter; of those that it gets wrong, those with any right program, and with a "
            "shorter one.",
            "",
            *markdown_lines(more, shorter, right=6),
            "",
        ]
    )


def _of_shorter(shorter: Mapping[str, Any]) -> tuple[str, ...]:
    right, corrected, wrong = (shorter[name] for name in ("right", "corrected", "wrong"))
    return (
        f"{right['n']:,}",
        share_text(right),
        f"{wrong['n']:,}",
        share_text(corrected),
        share_text(wrong),
    )


def _test(found: Reproduced, tested: Mapping[str, Any], *, report: Path) -> str:
    """Test questions: single-shot methods and pass@k side by side, then every method in full, and
    why baselines were left out.
    """
    lines = [
        "## Test",
        "",
        "The identity ran in the same job. Right answers in % with Wilson's 95 % interval, and "
        "executed steps in % of the identity's; pass@k and the whole menu are oracles, which "
        "choose by the answer key and run all of their programs.",
        "",
        *_side_by_side(tested["arms"]),
        "",
    ]
    if found.without_baselines:
        lines += [f"{found.without_baselines[0].upper()}{found.without_baselines[1:]}.", ""]
    for name, notes in tested["baselines"].items():
        if isinstance(notes, Mapping) and LEFT_OUT in notes:
            lines += [f"Left out, because it could not be trained: {name} ({notes[LEFT_OUT]}).", ""]
    lines += ["### Every method", "", (report / "arms.md").read_text(encoding="utf-8")]
    answers = report / "answers" / "arms.md"
    if found.plan.answers and answers.exists():
        lines += [
            f"### Generated answers, to {found.plan.answers:,} of the test questions",
            "",
            answers.read_text(encoding="utf-8"),
        ]
    return "\n".join(lines)


def _side_by_side(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a task, a column a method, of those that are told of first."""
    names = dict.fromkeys(arm["arm"] for arm in arms)
    shown = list(filter(_is_shown, names))
    cells = {(arm["task"], arm["arm"]): arm for arm in arms}
    rows: list[tuple[str, ...]] = []
    for task in dict.fromkeys(arm["task"] for arm in arms):
        of_task = [cells.get((task, name)) for name in shown]
        asked = next(arm["n"] for arm in of_task if arm is not None)
        rows.append((task, f"{asked:,}", *map(_cell, of_task)))
    return markdown_lines(("", "n", *shown), rows, right=1 + len(shown))


def _is_shown(label: str) -> bool:
    polar = f"{POLAR_NETWORK}{FIRST_OF_BEAM}"
    names = (IDENTITY, SELECTOR_ACCURACY, polar, f"{ANY_OF_MENU} (oracle)")
    return label in names or "pass@" in label


def _cell(arm: Mapping[str, Any] | None) -> str:
    if arm is None:
        return "–"
    ratio = arm["step_ratio"]
    steps = "" if ratio is None else f" at {100 * ratio['value']:.0f} %"
    return f"{share_text(arm['method'])}{steps}"


def _figures(figures: Iterable[Path], *, out: Path) -> str:
    links = [f"![{path.stem}]({path.relative_to(out).as_posix()})" for path in figures]
    return "\n\n".join(["## Figures", *links, ""]) if links else ""


def _item(line: str) -> str:
    return f"- {line}"


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f}"


def _mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"

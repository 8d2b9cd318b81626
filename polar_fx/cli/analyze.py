"""Say what searches found: accuracy, lengths, edits, a menu of programs, and how far to believe it;
draw it.

Reads the files that `search` writes, also while it runs. What explored programs answer is an
oracle: the answer key chose them. A menu is ranked on train questions and tried on others: of the
--held-out files, or of the same files.

Examples:
  python -m polar_fx analyze run.jsonl
  python -m polar_fx analyze train.jsonl --held-out test.jsonl --menu 1,5,20
  # needs matplotlib: pip install -e '.[search]' in a checkout
  python -m polar_fx analyze run.jsonl --figures figures --format png
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..environment import has_matplotlib, install_command
from ..errors import InputError
from ..output.plain_text import count
from .options import whole
from .verbosity import working

FORMATS = ("svg", "png")
_SPLITS = {
    "files": "those of the --held-out files",
    "splits": "the train split, tried on validation and test",
    "halves": "one half by a hash of the id, tried on the other",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "files", nargs="+", metavar="RUN.jsonl", help="search records; menus are ranked on them"
    )
    parser.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="OTHER.jsonl",
        help="search records to try menus on",
    )
    parser.add_argument(
        "--menu",
        type=_sizes,
        metavar="K,K,...",
        help="sizes of menus (default: 1,2,5,10,20,50,100)",
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="draw figures into this folder; needs matplotlib",
    )
    parser.add_argument("--format", choices=FORMATS, help="of the figures (default: svg)")


def _sizes(text: str) -> list[int]:
    return [whole(1)(part.strip()) for part in text.split(",")]


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Print and draw it; returns what `analysis.analyze` does, and `figures`, the files drawn."""
    if options.format and not options.figures:
        raise InputError(
            "--format is of figures, and none are asked for; name a folder with --figures"
        )
    if options.figures and not has_matplotlib():
        raise InputError(
            "--figures needs matplotlib, which is not installed; "
            f"{install_command('search')}, or leave it out"
        )

    from ..search.analysis.summary import MENU_SIZES, SearchFile, analyze  # numpy takes a while

    with working("reading ..."):
        files = list(map(SearchFile.read, options.files))
        held_out = list(map(SearchFile.read, options.held_out))
        report = analyze(files, held_out, menu_sizes=options.menu or MENU_SIZES)
    figures: list[Path] = []
    if options.figures:
        from ..search.analysis.figures import write_figures

        with working("drawing ..."):
            figures = write_figures(report, options.figures, format=options.format or "svg")
    if not options.json:
        console = Console(highlight=False)
        for file in report["files"]:
            _show_file(console, file)
        for menu in report["menus"]:
            _show_menu(console, menu)
        if options.figures:
            _say(
                console,
                f"{count(len(figures), 'figure')} in {options.figures}: "
                f"{', '.join(path.name for path in figures)}",
            )
    return {**report, "figures": [str(path) for path in figures]}


def _say(console: Console, text: str, *, style: str = "") -> None:
    # as Text: file names may have brackets, which are markup to rich
    console.print(Text(text, style), soft_wrap=True)


def _show_file(console: Console, file: Mapping[str, Any]) -> None:
    found = file["summary"]
    _say(console, file["path"], style="bold")
    searched = (
        f"{file['method']}, {file['simulations']} programs a question, reward {file['reward']}"
    )
    _say(console, f"{count(found['questions'], 'question')}, {file['depth']} layers; {searched}")
    if not found["questions"]:
        _say(console, "no questions yet\n")
        return
    several = len({group["task"] for group in file["groups"]}) > 1
    # A group that is all of the file says nothing new.
    groups = [
        group for group in file["groups"] if group["summary"]["questions"] < found["questions"]
    ]
    rows = [("all", found), *((_label(group, several), group["summary"]) for group in groups)]
    console.print(_accuracy_table(rows), _shorter_table(rows), _programs_table(rows))
    speed = found["evaluations_per_second"]
    if speed is not None:
        _say(
            console,
            f"{found['evaluations']:,} evaluations in {found['seconds']:,.1f} s: {speed:,.1f} a "
            "second",
        )
    edits = found["edits"]
    console.print(_counts_table(found))
    if edits["not_segmentable"]:
        _say(
            console,
            f"{count(edits['not_segmentable'], 'valid program')} of {edits['programs']:,} cannot "
            "be cut into segments",
        )
    if found["verification"]:
        _show_verification(console, found["verification"])
    if found["likelihood"]:
        _show_likelihood(console, found["likelihood"])
    _say(console, "")


def _label(group: Mapping[str, Any], with_task: bool) -> str:
    part = group["cell"] if group["difficulty"] is None else f"difficulty {group['difficulty']}"
    return ", ".join(([group["task"]] if with_task else []) + ([part] if part else []))


def _accuracy_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    table = _table(
        "accuracy in % with 95 % intervals: the identity, and an oracle over explored programs, "
        "chosen by the answer key: those that skip only, that repeat only, and any",
        "questions",
        "n",
        "identity",
        "+ skips",
        "+ repeats",
        "+ any",
    )
    for label, found in rows:
        table.add_row(
            Text(label),
            f"{found['questions']:,}",
            *(_share(share) for share in found["accuracy"].values()),
        )
    return table


def _shorter_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    table = _table(
        "the same oracle, in % of the questions that the identity gets right or wrong: those with "
        "a right program that is shorter than it, those with any",
        "questions",
        "n right",
        "shorter",
        "n wrong",
        "corrected",
        "by shorter",
    )
    for label, found in rows:
        right, corrected, wrong = (
            found["shorter"][name] for name in ("right", "corrected", "wrong")
        )
        table.add_row(
            Text(label),
            f"{right['n']:,}",
            _share(right),
            f"{wrong['n']:,}",
            _share(corrected),
            _share(wrong),
        )
    return table


def _programs_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    table = _table(
        "programs a question, on average; the shortest right one may be the identity",
        "questions",
        "explored",
        "valid",
        "n with a right one",
        "steps of the shortest",
    )
    for label, found in rows:
        shortest = found["shortest_steps"]
        steps = "-" if shortest["mean"] is None else f"{shortest['mean']:.2f}"
        table.add_row(
            Text(label),
            f"{found['explored']:.1f}",
            f"{found['valid']:.1f}",
            f"{shortest['n']:,}",
            steps,
        )
    return table


def _counts_table(found: Mapping[str, Any]) -> Table:
    """The histograms, a row each."""
    table = _table("histograms of right programs and their edits", "of", "n")
    table.add_column("value:count")
    for label, counts in (
        ("steps, valid programs", found["steps"]["valid"]),
        ("steps, shortest right ones", found["steps"]["shortest"]),
        ("layers of a skip", found["edits"]["skip"]),
        ("layers of a repeat", found["edits"]["repeat"]),
        ("runs of a repeat", found["edits"]["times"]),
    ):
        total = sum(n for _, n in counts)
        table.add_row(label, f"{total:,}", " ".join(f"{value}:{n}" for value, n in counts) or "-")
    return table


def _show_verification(console: Console, found: Mapping[str, Any]) -> None:
    for name, what in (
        (
            "flipped",
            f"verdicts of explored programs flip (of {count(found['questions'], 'question')}; "
            "those of one are alike, so the interval is too narrow)",
        ),
        ("identity_flipped", "verdicts of the identity flip"),
        ("corrected_confirmed", "corrected questions have a program that is right both times"),
    ):
        if found[name]["n"]:
            _say(
                console,
                f"verified once more: {_share(found[name])} % of {found[name]['n']:,} {what}",
            )


def _show_likelihood(console: Console, found: Mapping[str, Any]) -> None:
    pooled, mean = (
        "-" if found[name] is None else f"{found[name]:+.3f}" for name in ("pooled", "mean")
    )
    _say(
        console,
        f"rank correlation of log-likelihood gain and change of correctness: {pooled} pooled "
        f"({count(found['pairs'], 'pair')}), {mean} as mean of "
        f"{count(found['n_mean'], 'question')} where both vary",
    )


def _show_menu(console: Console, menu: Mapping[str, Any]) -> None:
    files = ", ".join(Path(path).name for path in menu["files"])
    _say(console, f"menu of programs, model {menu['model'][:12]}, {files}", style="bold")
    left_out = (
        f" ({menu['left_out']:,} that are in train as well are left out)"
        if menu["left_out"]
        else ""
    )
    _say(
        console,
        f"ranked on {count(menu['train'], 'question')} and tried on {menu['held_out']:,} held "
        f"out, {_SPLITS[menu['split']]}{left_out}",
    )
    if not menu["train"] or not menu["held_out"]:
        _say(console, "too few questions to rank a menu and to try it on others")
        return
    variants = [menu["menus"][name] for name in ("with_identity", "without_identity")]
    table = _table(
        "coverage in %, an oracle and a lower bound: what a question did not explore counts as "
        "wrong. Held out, unless in sample. Open: questions that identity + K leave uncovered and "
        "that did not explore all of the K",
        "K",
        "identity + K",
        "open",
        "in sample",
        "K alone",
        "in sample",
    )
    sizes = [len(variant["programs"]) for variant in variants]
    for rows in zip(*(variant["at"] for variant in variants), strict=True):
        if rows[0]["k"] <= max(sizes):
            cells = [(_share(row["held_out"]), _share(row["in_sample"])) for row in rows]
            table.add_row(
                f"{rows[0]['k']}",
                cells[0][0],
                f"{rows[0]['held_out']['undecided']:,}",
                cells[0][1],
                *cells[1],
            )
    table.add_section()
    cells = [
        (_share(variant["ceiling"]["held_out"]), _share(variant["ceiling"]["in_sample"]))
        for variant in variants
    ]
    table.add_row("explored", cells[0][0], "", cells[0][1], *cells[1])
    console.print(table)
    asked = variants[0]["at"][-1]["k"]
    if max(sizes) < asked:
        _say(
            console,
            f"they end at {sizes[0]} and {sizes[1]} programs: no further one covers a train "
            "question more",
        )
    best = [entry["program"].rpartition(" /")[0] for entry in variants[0]["programs"][:3]]
    if best:
        _say(console, f"first with the identity: {'; '.join(best)}")


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(
        first,
        title=title,
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in others:
        table.add_column(name, justify="right")
    return table


def _share(share: Mapping[str, Any]) -> str:
    """`42.4 [40, 45]`, in percent."""
    from ..stats.intervals import share_text

    return share_text(share, digits=0, unknown="-")

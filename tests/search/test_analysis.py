"""What is said of search records, against numbers found by hand and against slower ways to find
them.
"""

import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_fx.errors import InputError
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions import split_of
from polar_fx.search.analysis.edit_effects import EditEffect, edit_effects
from polar_fx.search.analysis.menu_coverage import (
    RankedMenu,
    coverage,
    greedy_menu,
    menu_report,
    merge,
    split_records,
)
from polar_fx.search.analysis.summary import (
    SearchFile,
    analyze,
    group_summaries,
    is_repeat_only,
    is_skip_only,
    summary,
)
from polar_fx.search.records.records import SearchRecord
from polar_fx.stats.intervals import Share, ranks, spearman, wilson
from search_samples import (
    DAMPED,
    DEPTH,
    HEADER,
    IDENTITY,
    MIXED,
    MOVED,
    REPEAT,
    SAMPLES,
    SKIP,
    SKIP_TWO,
    record,
    simple,
)


def _share(count: int, n: int) -> dict[str, object]:
    return Share(count, n).to_dict()


# Shares and ranks


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        (5, 10, 0.23659, 0.76341),
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (1, 10, 0.01788, 0.40415),
        (81, 263, 0.25529, 0.36621),
        (0, 0, 0.0, 1.0),
        (1, 1, 0.20655, 1.0),
    ],
)
def test_wilson_gives_known_intervals(count: int, n: int, low: float, high: float) -> None:
    assert wilson(count, n) == pytest.approx((low, high), abs=2e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(case: tuple[int, int]) -> None:
    count, n = case
    low, high = wilson(count, n)
    assert 0 <= low <= count / n <= high <= 1 and low < high
    assert wilson(n - count, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_a_share_of_none_has_no_value() -> None:
    assert _share(0, 0) == {"count": 0, "n": 0, "share": None, "low": None, "high": None}
    assert Share.of([True, False, True]) == Share(2, 3)


def test_ranks_share_the_mean() -> None:
    assert ranks([10, -math.inf, 10, 3]).tolist() == [3.5, 1, 3.5, 2]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / 120
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # ranks 1, 2.5, 2.5, 4
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.0),
        ([-math.inf, 0, 1], [0, 1, 1], 1.5 / math.sqrt(2 * 1.5)),  # ranks 1, 2.5, 2.5
    ],
)
def test_spearman_with_ties(first: list[float], second: list[float], expected: float) -> None:
    assert spearman(first, second) == pytest.approx(expected)
    assert spearman(second, first) == pytest.approx(expected)


@pytest.mark.parametrize(
    "pair", [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])]
)
def test_spearman_is_undefined_where_nothing_varies(pair: tuple[list[float], list[float]]) -> None:
    assert spearman(*pair) is None
    with pytest.raises(ValueError, match="pairs"):
        spearman([1.0], [])


# The summary


def test_kinds_of_programs() -> None:
    kinds = {
        p: (is_skip_only(p), is_repeat_only(p))
        for p in (IDENTITY, SKIP, SKIP_TWO, REPEAT, DAMPED, MIXED, MOVED)
    }
    assert [p for p, (skip, _) in kinds.items() if skip] == [SKIP, SKIP_TWO]
    assert [p for p, (_, repeat) in kinds.items() if repeat] == [REPEAT, DAMPED]
    assert not is_skip_only(Program.parse("0 [1-2]@0.5 3-4 /6")) and not is_repeat_only(
        Program.from_path([1, 0, 2, 3, 4, 5], 6)
    )


def test_summary_against_hand_computed_numbers() -> None:
    found = summary(SAMPLES)
    assert found["questions"] == 6 and found["depth"] == DEPTH
    assert found["accuracy"] == {
        "baseline": _share(1, 6),
        "skip_only": _share(2, 6),
        "repeat_only": _share(3, 6),
        "both": _share(4, 6),
    }
    assert found["shorter"] == {
        "right": _share(1, 1),
        "wrong": _share(1, 5),
        "corrected": _share(3, 5),
    }
    assert found["shortest_steps"] == {"mean": pytest.approx((5 + 7 + 4 + 8) / 4), "n": 4}
    assert (found["explored"], found["valid"]) == (pytest.approx(8 / 6), pytest.approx(4 / 6))
    assert (found["evaluations"], found["seconds"], found["evaluations_per_second"]) == (9, 4, 2.25)
    steps = [[4, 1], [5, 1], [7, 1], [8, 1]]
    assert found["steps"] == {"valid": steps, "shortest": steps}
    assert found["edits"] == {
        "programs": 4,
        "not_segmentable": 0,
        "skip": [[1, 1], [2, 1]],
        "repeat": [[1, 1], [2, 1]],
        "times": [[2, 2]],
    }
    assert found["verification"] == {
        "programs": 4,
        "questions": 3,
        "flipped": _share(2, 4),
        "identity_flipped": _share(1, 1),
        "corrected_confirmed": _share(1, 2),
    }
    # Ranks of the gains 1, -1, -2, .25, 2, 1.5 are 4, 2, 1, 3, 6, 5; of the changes 1, 0, -1, 0, 1,
    # 1: 5, 2.5, 1, 2.5, 5, 5.
    assert found["likelihood"] == {
        "pairs": 6,
        "questions": 3,
        "pooled": pytest.approx(15 / math.sqrt(17.5 * 15)),
        "mean": pytest.approx(1),
        "n_mean": 2,
    }
    assert json.loads(json.dumps(found)) == found


def test_summary_of_nothing() -> None:
    found = summary([])
    assert found["accuracy"]["both"] == _share(0, 0) and found["shortest_steps"] == {
        "mean": None,
        "n": 0,
    }
    assert all(
        found[name] is None
        for name in ("depth", "explored", "evaluations_per_second", "verification", "likelihood")
    )


def test_summary_leaves_its_records_alone_and_takes_an_iterator() -> None:
    assert summary(iter(SAMPLES)) == summary(SAMPLES) == summary(SAMPLES[::-1])


def test_summary_of_two_depths_is_refused() -> None:
    other = SearchRecord(SAMPLES[0].question, 3, Verdict(True), ())
    with pytest.raises(InputError, match="3 and 6 layers"):
        summary([SAMPLES[0], other])


def test_scores_without_a_number_are_left_out() -> None:
    verdicts = {
        SKIP: Verdict(False, math.nan),
        REPEAT: Verdict(False, -math.inf),
        MIXED: Verdict(True, -1.0),
    }
    found = summary(
        [
            record("a", Verdict(False, -2.0), verdicts),
            record("b", Verdict(False, math.nan), verdicts),
        ]
    )
    assert found["likelihood"] == {"pairs": 2, "questions": 1, "pooled": 1, "mean": 1, "n_mean": 1}
    assert [
        e.n_log_likelihood for e in edit_effects([record("a", Verdict(False, -2.0), verdicts)])
    ] == [0, 0]


def test_groups() -> None:
    groups = group_summaries(SAMPLES)
    assert [(g["task"], g["difficulty"], g["cell"], g["summary"]["questions"]) for g in groups] == [
        ("add", None, None, 3),
        ("add", 1, None, 2),
        ("add", 2, None, 1),
        ("add", None, "a", 2),
        ("add", None, "b", 1),
        ("mul", None, None, 3),
    ]
    assert groups[3]["summary"] == summary([SAMPLES[0], SAMPLES[2]])


def test_effects_of_single_edits() -> None:
    assert edit_effects(SAMPLES) == [
        # right once more and once less; +1 and -2 nats
        EditEffect("skip", 2, 1, 1, 1.0, 2, 0.0, 2, -0.5),
        EditEffect("skip", 0, 2, 1, 1.0, 1, 0.0, 0, None),
        EditEffect("repeat", 3, 1, 2, 1.0, 2, 0.0, 2, -0.375),
        EditEffect("repeat", 0, 2, 2, 0.5, 1, 1.0, 0, None),
    ]


# Menus

A, B, C, D = (Program.identity(DEPTH).skip(i) for i in range(4))


def test_a_menu_by_hand() -> None:
    records = [
        simple("1", {A, B}),
        simple("2", {A, C}),
        simple("3", {A, D}, baseline=True),
        simple("4", {B}),
        simple("5", {D}, {A}),
        simple("6", set(), {A}),
    ]
    alone = greedy_menu(records, 9, with_identity=False)
    # B and D cover one more each, and are alike but for their text
    assert alone == RankedMenu((A, B, D), (3, 1, 1), False)
    assert coverage(alone, records).covered == (0, 3, 4, 5)
    assert coverage(alone, records).undecided == (0, 1, 2, 1)  # 4 without A; 5 and 6 without B; 6
    beside = greedy_menu(records, 2, with_identity=True)
    assert beside.gains == (2, 1) and beside.programs == (A, B)
    assert coverage(beside, records).covered == (1, 3, 4)


def test_of_equals_the_one_valid_for_more_comes_first_then_the_shorter() -> None:
    records = [
        simple("1", {A, SKIP_TWO}),
        simple("2", {B}, baseline=True),
        simple("3", {B, A}),
        simple("4", {SKIP_TWO}),
    ]
    assert greedy_menu(records, 1, with_identity=True).programs == (SKIP_TWO,)
    assert greedy_menu(
        [simple("1", {A, B}), simple("2", {B}, baseline=True)], 1, with_identity=True
    ).programs == (B,)


def test_no_questions_have_no_menu() -> None:
    assert (
        greedy_menu([], 5, True).programs
        == ()
        == greedy_menu([simple("1", set(), {A})], 5, False).programs
    )
    assert coverage(RankedMenu((A,), (1,), True), []).at(1) == {**_share(0, 0), "undecided": 0}


POOL = [Program.identity(DEPTH).skip(i, n) for i, n in itertools.product(range(4), (1, 2))]


def _random_records(seed: int, n: int) -> list[SearchRecord]:
    drawn = random.Random(seed)
    return [
        simple(
            str(i),
            set(drawn.sample(POOL, drawn.randrange(4))),
            set(drawn.sample(POOL, 2)),
            drawn.random() < 0.3,
        )
        for i in range(n)
    ]


@given(st.integers(0, 10**6), st.integers(0, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_menus_against_brute_force(seed: int, n: int, with_identity: bool) -> None:
    records = _random_records(seed, n)
    menu = greedy_menu(records, len(POOL), with_identity)
    curve = coverage(menu, records)
    start = {r.question.id for r in records if with_identity and r.baseline.correct}
    covers = {p: {r.question.id for r in records if p in r.valid} for p in POOL}
    covered = set(start)
    for k, (program, gain) in enumerate(zip(menu.programs, menu.gains, strict=True), start=1):
        assert (
            gain
            == max(len(ids - covered) for ids in covers.values())
            == len(covers[program] - covered)
            > 0
        )
        covered |= covers[program]
        assert curve.covered[k] == len(covered)
        seen = {
            r.question.id
            for r in records
            if set(menu.programs[:k]) <= {e.program for e in r.explored}
        }
        assert curve.undecided[k] == len({r.question.id for r in records} - covered - seen)
        best = max(
            len(start.union(*(covers[p] for p in chosen)))
            for chosen in itertools.combinations(POOL, k)
        )
        # Nemhauser et al.
        assert best >= len(covered) and len(covered) - len(start) >= (1 - 1 / math.e) * (
            best - len(start)
        )
    assert covered == start.union(*covers.values())


def test_merged_files_keep_first_verdicts() -> None:
    first, second = simple("1", {A}, {B}), simple("1", {B, C}, {D}, baseline=True)
    second = replace(second, verified={C: Verdict(False), B: Verdict(False)})
    (merged,) = merge([first, second])
    assert merged.valid == (A,) and merged.verified == {C: Verdict(False)}
    assert merged.baseline == first.baseline
    assert {e.program: e.verdict.correct for e in merged.explored} == {
        A: True,
        B: False,
        C: True,
        D: False,
    }
    assert len(merge([first, replace(second, question=replace(second.question, task="mul"))])) == 2


def test_splits() -> None:
    records = [simple(f"add:{i}", {A}) for i in range(200)]
    train, others, how = split_records(records)
    assert how == "splits" and len(train) + len(others) == 200
    assert (
        {split_of(r.question.id) for r in train}
        == {"train"}
        == {split_of(r.question.id) for r in records} - {split_of(r.question.id) for r in others}
    )
    first, second, how = split_records(train)  # of one split
    assert (
        how == "halves"
        and len(first) + len(second) == len(train)
        and 0.3 < len(first) / len(train) < 0.7
    )
    for a, b in itertools.combinations(range(20), 2):  # 7x8 and 8x7 are in one half
        pair = [simple(f"{a}x{b}", {A}), simple(f"{b}x{a}", {A})]
        assert 2 in map(len, split_records(pair)[:2])
    assert split_records([]) == ([], [], "halves")


def test_a_menu_report() -> None:
    train = [simple("1", {A}, {B}), simple("2", {A}, {B}), simple("3", {B}, {A})]
    held_out = [
        simple("4", {A}, {B}),
        simple("5", {C}, {A, B}),
        simple("6", {B}),
        simple("7", set(), {A}, baseline=True),
    ]
    found = menu_report(train, held_out, [1, 2, 50])
    alone, beside = found["without_identity"], found["with_identity"]
    assert [p["program"] for p in alone["programs"]] == [str(A), str(B)] and [
        p["gain"] for p in alone["programs"]
    ] == [2, 1]
    assert alone["curve"]["held_out"] == {"n": 4, "covered": [0, 1, 2], "undecided": [0, 1, 1]}
    assert beside["curve"]["held_out"] == {"n": 4, "covered": [1, 2, 3], "undecided": [0, 1, 0]}
    assert [row["k"] for row in alone["at"]] == [1, 2, 50]
    assert (
        alone["at"][1]["held_out"] == alone["at"][2]["held_out"] == {**_share(2, 4), "undecided": 1}
    )
    assert alone["at"][0]["in_sample"] == {**_share(2, 3), "undecided": 0}
    assert alone["ceiling"] == {"in_sample": _share(3, 3), "held_out": _share(3, 4)}
    assert beside["ceiling"]["held_out"] == _share(4, 4)


def test_menus_are_made_a_model() -> None:
    files = [
        SearchFile("a", HEADER, tuple(SAMPLES[:3])),
        SearchFile("b", HEADER, tuple(SAMPLES[2:4])),
        SearchFile("c", replace(HEADER, model="e" * 32), tuple(SAMPLES[:1])),
    ]
    held_out = SearchFile("d", HEADER, tuple(SAMPLES[3:]))
    found = analyze(files, [held_out], [1])
    assert [(m["files"], m["held_out_files"], m["split"]) for m in found["menus"]] == [
        (["a", "b"], ["d"], "files"),
        (["c"], [], "halves"),
    ]
    assert [found["menus"][0][name] for name in ("train", "held_out", "left_out")] == [4, 2, 1]
    with pytest.raises(InputError, match="d is of model ffffffffffff with 6 layers, which no menu"):
        analyze(files[2:], [held_out])
    for sizes in ([], [0, 1]):
        with pytest.raises(InputError, match="menu sizes"):
            analyze(files, menu_sizes=sizes)


# Figures


def _report(records: list[SearchRecord], *paths: str) -> dict[str, object]:
    return analyze(
        [SearchFile(path, HEADER, tuple(records)) for path in paths or ("runs/one.jsonl",)]
    )


KINDS = ("accuracy", "steps", "edits", "menu", "effects", "overview")


def test_svg_figures_are_whole_and_the_same_each_time(tmp_path: Path) -> None:
    write_figures = pytest.importorskip("polar_fx.search.analysis.figures").write_figures
    report = _report(SAMPLES)
    first, second = (write_figures(report, tmp_path / name) for name in ("new/a", "b"))
    assert [path.name for path in first] == [f"one-{kind}.svg" for kind in KINDS]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and b"<dc:date>" not in one.read_bytes()
        assert ET.parse(one).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(
        path.name for path in second
    )


def test_png_figures_of_several_files(tmp_path: Path) -> None:
    write_figures = pytest.importorskip("polar_fx.search.analysis.figures").write_figures
    drawn = write_figures(_report(SAMPLES, "a/run.jsonl", "b/run.jsonl"), tmp_path, "png")
    assert [path.name for path in drawn if "overview" in path.name] == [
        "run-overview.png",
        "run-2-overview.png",
    ]
    assert len([path for path in drawn if "menu" in path.name]) == 1  # the model's
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in drawn)


@pytest.mark.parametrize(
    ("records", "kinds"),
    [
        ([], ()),
        # one question is no menu
        (SAMPLES[:1], ("accuracy", "steps", "edits", "effects", "overview")),
        (SAMPLES[5:], ("accuracy", "overview")),
        ([simple("1", {MOVED}), simple("2", {MOVED})], ("accuracy", "steps", "overview")),
    ],
)
def test_figures_are_left_out_where_there_are_no_data(
    records: list[SearchRecord], kinds: tuple[str, ...], tmp_path: Path
) -> None:
    write_figures = pytest.importorskip("polar_fx.search.analysis.figures").write_figures
    drawn = [
        re.sub(r"one-|\.svg", "", path.name) for path in write_figures(_report(records), tmp_path)
    ]
    assert [kind for kind in drawn if kind != "menu"] == list(kinds)


def test_figures_say_how_many(tmp_path: Path) -> None:
    """Bars, labels and limits of the accuracy figure."""
    figures = pytest.importorskip("polar_fx.search.analysis.figures")
    (axes,) = dict(figures.figures(_report(SAMPLES)))["one-accuracy"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "all\nn = 6",
        "add\nn = 3",
        "mul\nn = 3",
    ]
    heights = [bar.get_height() for bar in axes.patches]
    assert len(heights) == 12
    # a color after the other
    assert [heights[i] for i in (0, 3, 6, 9)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6])
    shares = axes.get_legend().get_texts()
    assert [text.get_text() for text in shares] == [
        "identity",
        "+ skips only",
        "+ repeats only",
        "+ any explored",
    ]


def test_bad_figure_arguments(tmp_path: Path) -> None:
    write_figures = pytest.importorskip("polar_fx.search.analysis.figures").write_figures
    with pytest.raises(InputError, match="unknown figure format 'gif'; use one of svg, png"):
        write_figures(_report(SAMPLES), tmp_path, "gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make the folder .*file"):
        write_figures(_report(SAMPLES), tmp_path / "file")

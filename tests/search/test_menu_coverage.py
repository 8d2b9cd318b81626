"""Menus and what they cover: by hand, and against brute force."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_fx.errors import InputError
from polar_fx.judge.verdict import Verdict
from polar_fx.program import Program
from polar_fx.questions import split_of
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
)
from polar_fx.search.records.records import SearchRecord
from search_samples import (
    DEPTH,
    HEADER,
    SAMPLES,
    SKIP_TWO,
    simple,
)
from shares import share

A, B, C, D = (Program.identity(DEPTH).skip(i) for i in range(4))


def test_a_menu_by_hand() -> None:
    records = [
        simple("1", {A, B}),
        simple("2", {A, C}),
        simple("3", {A, D}, baseline=True),
        simple("4", {B}),
        simple("5", {D}, wrong={A}),
        simple("6", set(), wrong={A}),
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
        greedy_menu([], 5, with_identity=True).programs
        == ()
        == greedy_menu([simple("1", set(), wrong={A})], 5, with_identity=False).programs
    )
    assert coverage(RankedMenu((A,), (1,), True), []).at(1) == {**share(0, 0), "undecided": 0}


POOL = [Program.identity(DEPTH).skip(i, n) for i, n in itertools.product(range(4), (1, 2))]


def _random_records(seed: int, n: int) -> list[SearchRecord]:
    drawn = random.Random(seed)
    return [
        simple(
            str(i),
            set(drawn.sample(POOL, drawn.randrange(4))),
            wrong=set(drawn.sample(POOL, 2)),
            baseline=drawn.random() < 0.3,
        )
        for i in range(n)
    ]


@given(st.integers(0, 10**6), st.integers(0, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_menus_against_brute_force(seed: int, n: int, with_identity: bool) -> None:
    records = _random_records(seed, n)
    menu = greedy_menu(records, len(POOL), with_identity=with_identity)
    curve = coverage(menu, records)
    start = {r.question.id for r in records if with_identity and r.baseline.correct}
    covers: dict[Program, set[str]] = {}
    for program in POOL:
        covers[program] = {r.question.id for r in records if program in r.valid}
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
        seen = {r.question.id for r in records if r.verdicts.keys() >= set(menu.programs[:k])}
        assert curve.undecided[k] == len({r.question.id for r in records} - covered - seen)
        menus = itertools.combinations(covers.values(), k)
        best = max(len(start.union(*chosen)) for chosen in menus)
        # Nemhauser et al.
        assert best >= len(covered) and len(covered) - len(start) >= (1 - 1 / math.e) * (
            best - len(start)
        )
    assert covered == start.union(*covers.values())


def test_merged_files_keep_first_verdicts() -> None:
    first, second = simple("1", {A}, wrong={B}), simple("1", {B, C}, wrong={D}, baseline=True)
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
    assert {split_of(r.question.id) for r in train} == {"train"}
    assert "train" not in {split_of(r.question.id) for r in others}
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
    train = [simple("1", {A}, wrong={B}), simple("2", {A}, wrong={B}), simple("3", {B}, wrong={A})]
    held_out = [
        simple("4", {A}, wrong={B}),
        simple("5", {C}, wrong={A, B}),
        simple("6", {B}),
        simple("7", set(), wrong={A}, baseline=True),
    ]
    found = menu_report(train, held_out, ks=[1, 2, 50])
    alone, beside = found["without_identity"], found["with_identity"]
    ranked = [{"program": str(A), "gain": 2}, {"program": str(B), "gain": 1}]
    assert alone["programs"] == ranked
    assert alone["curve"]["held_out"] == {"n": 4, "covered": [0, 1, 2], "undecided": [0, 1, 1]}
    assert beside["curve"]["held_out"] == {"n": 4, "covered": [1, 2, 3], "undecided": [0, 1, 0]}
    assert [row["k"] for row in alone["at"]] == [1, 2, 50]
    assert (
        alone["at"][1]["held_out"] == alone["at"][2]["held_out"] == {**share(2, 4), "undecided": 1}
    )
    assert alone["at"][0]["in_sample"] == {**share(2, 3), "undecided": 0}
    assert alone["ceiling"] == {"in_sample": share(3, 3), "held_out": share(3, 4)}
    assert beside["ceiling"]["held_out"] == share(4, 4)


def test_menus_are_made_a_model() -> None:
    files = [
        SearchFile("a", HEADER, tuple(SAMPLES[:3])),
        SearchFile("b", HEADER, tuple(SAMPLES[2:4])),
        SearchFile("c", replace(HEADER, model="e" * 32), tuple(SAMPLES[:1])),
    ]
    held_out = SearchFile("d", HEADER, tuple(SAMPLES[3:]))
    found = analyze(files, [held_out], menu_sizes=[1])
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

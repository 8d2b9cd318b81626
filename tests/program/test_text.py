"""Programs as text: parsing, printing, mistakes; and properties of every kind of program."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_fx.errors import ProgramError, ProgramTextError
from polar_fx.program import Blend, Edit, Op, Program

SKIP, KEEP, REPEAT = Op.SKIP, Op.KEEP, Op.REPEAT
DAMPINGS = st.sampled_from([1.0, 0.5, 0.25, 0.1, 0.3, 1e-05])


@st.composite
def edited_programs(draw: st.DrawFn) -> Program:
    """The identity with disjoint edits: always segmentable."""
    depth = draw(st.integers(1, 12))
    edits, layer = [], draw(st.integers(0, 3))
    while layer < depth:
        length = draw(st.integers(1, min(4, depth - layer)))
        if draw(st.booleans()):
            edits.append(Edit(layer, length, REPEAT, draw(st.integers(2, 5)), draw(DAMPINGS)))
        elif length < depth:
            edits.append(Edit(layer, length, SKIP))
        layer += length + draw(st.integers(0, 3))
    if sum(edit.length for edit in edits if edit.op is SKIP) == depth:
        edits.pop()
    return Program.from_edits(draw(st.permutations(edits)), depth)


@st.composite
def nested_programs(draw: st.DrawFn) -> Program:
    """A program made by random edits of the current path; edits that cut a blend are left out."""
    program = Program.identity(draw(st.integers(1, 8)))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, program.num_steps - 1))
        length = draw(st.integers(1, min(4, program.num_steps - start)))
        try:
            if draw(st.booleans()):
                program = program.repeat(start, length, draw(st.integers(2, 4)), draw(DAMPINGS))
            elif length < program.num_steps:
                program = program.skip(start, length)
        except ProgramError as error:
            assert "cuts the blend" in str(error) or "the limit is" in str(error)
    return program


@st.composite
def free_programs(draw: st.DrawFn) -> Program:
    """Any path over few layers with any laminar blends."""
    depth = draw(st.integers(1, 4))
    path = draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=14))
    program = Program.from_path(path, depth)
    for start, length in draw(
        st.lists(st.tuples(st.integers(0, 13), st.integers(1, 14)), max_size=6)
    ):
        if start < len(path):
            blend = Blend(start, min(start + length, len(path)), draw(DAMPINGS))
            try:
                program = Program(depth, program.path, (*program.blends, blend))
            except ProgramError as error:
                assert "overlap" in str(error)
    return program


PROGRAMS = st.one_of(edited_programs(), nested_programs(), free_programs())


@given(nested_programs(), st.data())
def test_skip_undoes_an_inner_repeat(program: Program, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, program.num_steps - 1))
    times = data.draw(st.integers(2, 4))
    repeated = program.repeat(start, 1, times, data.draw(DAMPINGS))
    assert (
        repeated.path
        == program.path[:start] + (program.path[start],) * times + program.path[start + 1 :]
    )
    assert repeated.skip(start + 1, times - 1) == program


@pytest.mark.parametrize(
    ("text", "path", "blends"),
    [
        ("5 /6", (5,), ()),
        ("0-2 /3", (0, 1, 2), ()),
        ("2, 1 ,0/3", (2, 1, 0), ()),
        ("\t0 - 1\n2 / 3 ", (0, 1, 2), ()),
        ("3-3 /4", (3,), ()),
        ("(0 1)*2 /2", (0, 1, 0, 1), ()),
        ("( 0-1 ) * 2 @ 0.5 /2", (0, 1, 0, 1), (Blend(2, 4, 0.5),)),
        ("(0)*3@.25(1)*2/2", (0, 0, 0, 1, 1), (Blend(1, 2, 0.25), Blend(2, 3, 0.25))),
        ("[0 1]@0.5 /2", (0, 1), (Blend(0, 2, 0.5),)),
        ("[0 1]@1 (0)*2@1.0 /2", (0, 1, 0, 0), ()),
        ("[[0]@0.5]@0.5 /1", (0,), (Blend(0, 1, 0.25),)),
        ("([0]@0.5)*2@0.5 /1", (0, 0), (Blend(0, 1, 0.5), Blend(1, 2, 0.25))),
        ("((0)*2 1)*2 /2", (0, 0, 1, 0, 0, 1), ()),
        ("[0 [1]@0.5]@5e-1 /2", (0, 1), (Blend(0, 2, 0.5), Blend(1, 2, 0.5))),
        ("identity /3", (0, 1, 2), ()),
        ("skip 1 /3", (0, 2), ()),
        ("repeat 1 /3", (0, 1, 1, 2), ()),
        (
            "repeat 1-2 x3 @0.5; skip 0 /4",
            (1, 2, 1, 2, 1, 2, 3),
            (Blend(2, 4, 0.5), Blend(4, 6, 0.5)),
        ),
        ("repeat 0@0.5,skip 2-3 /4", (0, 0, 1), (Blend(1, 2, 0.5),)),
    ],
)
def test_parse(text: str, path: tuple[int, ...], blends: tuple[Blend, ...]) -> None:
    program = Program.parse(text)
    assert (program.path, program.blends) == (path, blends)
    assert Program.parse(text, program.depth) == program
    assert Program.parse(str(program)) == program


def test_depth_as_argument() -> None:
    assert Program.parse("0-4 6-29", depth=30) == Program.parse("0-4 6-29 /30")
    assert Program.parse("identity", 3) == Program.identity(3)
    assert Program.parse("skip 3-5, repeat 10-11 x3 @0.5", 30) == Program.parse(
        "0-2 6-9 (10-11)*3@0.5 12-29 /30"
    )


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("0 1 2", "0-2"),
        ("0 2 1", "0 2 1"),
        ("2 1 0", "2 1 0"),
        ("0 0", "(0)*2"),
        ("0 0 0 0 0", "(0)*5"),
        ("0 0 0 0 1", "(0)*4 1"),
        ("0 1 0 1 2", "(0-1)*2 2"),
        ("0 0 1 0 0 1 2", "((0)*2 1)*2 2"),
        ("1 [1]@0.5 [1]@0.5", "(1)*3@0.5"),
        ("1 1 [1]@0.5", "(1)*2 [1]@0.5"),
        ("[1]@0.5 [1]@0.5", "([1]@0.5)*2"),
        ("[1]@0.5 [1]@0.25", "[1]@0.5 [1]@0.25"),
        ("0 1 [0 1]@0.1 2", "(0-1)*2@0.1 2"),
        ("0 1 [0]@0.5 1", "0-1 [0]@0.5 1"),
        ("0 (1)*2@0.5 0 (1)*2@0.5", "(0 (1)*2@0.5)*2"),
        ("(0-1)*2 [(0-1)*2]@0.5", "((0-1)*2)*2@0.5"),
        ("[0 [1 [2]@0.5]@0.25]@1e-05", "[0 [1 [2]@0.5]@0.25]@1e-05"),
    ],
)
def test_printing(text: str, printed: str) -> None:
    program = Program.parse(text, 3)
    assert str(program) == f"{printed} /3"
    assert Program.parse(str(program)) == program


@settings(max_examples=300)
@given(PROGRAMS)
def test_text_round_trip(program: Program) -> None:
    text = str(program)
    again = Program.parse(text)
    assert again == program
    assert (again.fingerprint, str(again), hash(again)) == (
        program.fingerprint,
        text,
        hash(program),
    )
    assert Program.parse(text.replace(" ", "\n ")) == program
    assert Program.parse(text.removesuffix(f" /{program.depth}"), program.depth) == program


@given(edited_programs())
def test_segmentable_programs_print_their_segments(program: Program) -> None:
    items = []
    for segment in program.segments():
        last = segment.stop - 1
        layers = f"{segment.start}" if segment.start == last else f"{segment.start}-{last}"
        damping = "" if segment.damping == 1 else f"@{segment.damping!r}"
        if segment.op is not SKIP:
            items.append(layers if segment.op is KEEP else f"({layers})*{segment.times}{damping}")
    assert str(program) == f"{' '.join(items)} /{program.depth}"


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("", 0, "empty program"),
        ("   ", 3, "empty program"),
        ("/3", 0, "expected a layer"),
        ("0-4 6-29", 8, "unknown depth; end the text with /30"),
        ("identity", 8, "unknown depth"),
        ("0-4 /", 5, "expected the depth"),
        ("0 /3 5", 5, "put /3 last"),
        ("0 /3 /3", 5, "put /3 last"),
        ("0 /0", 3, "the depth is 0"),
        ("0 /99999", 3, "the depth is 99999"),
        ("0 $ /3", 2, r"unexpected character '\$'"),
        ("0 3 /3", 2, "layer of a 3-layer model is 3; give a whole number from 0 to 2"),
        ("0-7 /3", 2, "is 7"),
        ("skip 9 /3", 5, "is 9"),
        ("2-1 /3", 2, "range 2-1 descends"),
        ("-1 /3", 0, "found '-'"),
        ("0-1-2 /3", 3, "unexpected '-'"),
        ("0- /3", 3, "expected layer of a 3-layer model"),
        ("1.0 /3", 0, "is 1.0; give a whole number"),
        ("1e0 /3", 0, "is 1e0; give a whole number"),
        ("0 ² /3", 2, "unexpected character"),
        ("0,,1 /3", 2, "found ','"),
        (",0 /3", 0, "found ','"),
        ("0, /3", 3, "expected a layer"),
        ("() /3", 1, r"expected a layer, a range or a group, found '\)'"),
        ("(0 1 /3", 0, r"'\(' is never closed"),
        ("[(0)*2 /3", 0, r"'\[' is never closed"),
        ("0) /3", 1, "closes nothing"),
        ("(0]*2 /3", 2, r"'\]' closes '\(' at column 1"),
        ("[0)@0.5 /3", 2, r"'\)' closes '\['"),
        ("(0) /3", 4, r"expected '\*'"),
        ("(0)*1 /3", 4, "times is 1"),
        ("(0)*0.5 /3", 4, "times is 0.5"),
        ("(0)* /3", 5, "expected times"),
        ("[0] /3", 4, "expected '@'"),
        ("[0]@0 /3", 4, "damping is '0'"),
        ("[0]@1.5 /3", 4, "damping is '1.5'"),
        ("(0)*2@ /3", 7, "damping is the end"),
        ("[0]@1e-999 /3", 4, "damping is '1e-999'"),
        ("0 (1)*999999999 /3", 2, "1000000000 steps, the limit is 4096"),
        ("((0)*4000)*4000 /3", 0, "16000000 steps"),
        ("(0)*4096 1 /3", 9, "4097 steps"),
        (f"(0)*{'9' * 5000} /3", 4, "5000 digits"),
        ("keep 1 /3", 0, "expected an edit, found 'keep'; the edits are: skip 5, repeat 10-11 x3"),
        ("0 skip 1 /3", 2, "unexpected 'skip'"),
        ("identity 0 /3", 9, "expected the end after 'identity'"),
        ("skip /3", 5, "expected layer"),
        ("skip 1 repeat 2 /3", 7, "separate edits with a comma"),
        ("skip 1, /3", 8, "expected an edit"),
        ("skip 1 x2 /3", 7, "unexpected 'x'"),
        ("skip 1 @0.5 /3", 7, "unexpected '@'"),
        ("repeat 1 x1 /3", 10, "times is 1"),
        ("repeat 1 y3 /3", 9, "unexpected 'y'"),
    ],
)
def test_text_errors(text: str, position: int, reason: str) -> None:
    with pytest.raises(ProgramTextError, match=reason) as caught:
        Program.parse(text)
    assert (caught.value.text, caught.value.position) == (text, position)
    assert f"(column {position + 1})" in str(caught.value)


def test_depth_mismatch() -> None:
    with pytest.raises(
        ProgramTextError, match="the text says depth 30, the argument depth=28"
    ) as caught:
        Program.parse("0-4 6-29 /30", depth=28)
    assert caught.value.position == 10
    with pytest.raises(ProgramError, match=r"depth .* is -1"):
        Program.parse("0", depth=-1)


def test_edit_text_errors_name_the_edits() -> None:
    with pytest.raises(ProgramError, match="edits of layers 1:2 and 1:3 overlap"):
        Program.parse("repeat 1, skip 1-2 /4")
    with pytest.raises(ProgramError, match="empty program"):
        Program.parse("skip 0-3 /4")
    with pytest.raises(ProgramError, match="the limit is 4096"):
        Program.parse("repeat 0 x99999999 /4")


def mistake(text: str) -> ProgramTextError:
    with pytest.raises(ProgramTextError) as caught:
        Program.parse(text)
    return caught.value


def test_caret_is_under_the_mistake() -> None:
    error = mistake("0\t1 %\n/3")
    reason, shown, caret = str(error).split("\n")
    assert reason.startswith("unexpected character '%'") and reason.endswith("(column 5)")
    assert (shown, caret) == ("  0 1 % /3", "      ^")
    long = "0 " * 500 + "!" + " 1" * 500
    _, shown, caret = str(mistake(long)).split("\n")
    assert len(shown) < 120 and shown[len(caret) - 1] == "!"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_deep_nesting_needs_no_recursion() -> None:
    blends = tuple(Blend(0, stop, 0.5) for stop in range(1, 2001))
    program = Program(1, (0,) * 2000, blends)
    assert Program.parse(str(program)) == program
    with pytest.raises(ProgramTextError, match="never closed"):
        Program.parse("(" * 50_000 + "0 /1")


@given(st.text(alphabet="0123 -,;()[]*@./xskiprepeatidentity", max_size=30))
def test_any_text_parses_or_fails_cleanly(text: str) -> None:
    try:
        program = Program.parse(text, depth=4)
    except ProgramError:
        return
    assert Program.parse(str(program)) == program


@given(PROGRAMS, PROGRAMS)
def test_fingerprint_tells_programs_apart(one: Program, other: Program) -> None:
    assert (one == other) == (one.fingerprint == other.fingerprint) == (str(one) == str(other))


@settings(max_examples=50)
@given(edited_programs())
def test_words_read_back(program: Program) -> None:
    assert Program.parse(program.words, program.depth) == program


def test_words_are_what_people_write() -> None:
    words = {
        "0-29": "identity",
        "0-4 6-29": "skip 5",
        "0-2 6-9 (10-11)*3@0.5 12-29": "skip 3-5, repeat 10-11 x3 @0.5",
        "0-13 (14)*2 15-29": "repeat 14 x2",
        "3 2": "3 2 /30",
    }
    assert {text: Program.parse(text, 30).words for text in words} == words

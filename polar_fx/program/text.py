"""The text form of programs: reading it with exact error positions, and printing the canonical
form.

    text   := body ['/' depth]           body := 'identity' | edits | items
    items  := item { [','] item }        item := layer ['-' layer]
                                               | '(' items ')' '*' times ['@' damping]
                                               | '[' items ']' '@' damping
    edits  := edit { (',' | ';') edit }  edit := 'skip' layers | 'repeat' layers ['x' times] ['@'
    damping]

`a-b` includes b. In `(...)*n@a` the first pass is plain and every further pass is blended in with
a; `[...]@a` blends a single pass. Printing uses items only.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from ..errors import ProgramTextError
from .parts import MAX_STEPS, Blend, Edit, Op, Step
from .segments import segments_of_edits, steps_of_segments

_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<word>[A-Za-z]+)|(?P<sign>[-,;()\[\]*@/])"
)
_MAX_DIGITS = 9  # longer whole numbers are refused unread: int() of a huge literal is slow


class _Token(NamedTuple):
    kind: str  # number, word, sign or end
    text: str
    position: int


@dataclass
class _Frame:
    """The steps laid out so far inside one pair of brackets (or at top level)."""

    opener: _Token | None
    path: list[int] = field(default_factory=list[int])
    blends: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])

    def append(self, body: "_Frame", damping: float) -> None:
        """Run `body` once more, blended in with `damping`."""
        base = len(self.path)
        self.path += body.path
        blends = {(base + start, base + stop): each for (start, stop), each in body.blends.items()}
        if damping < 1:
            whole = (base, len(self.path))
            blends[whole] = blends.get(whole, 1.0) * damping
        self.blends |= blends


def parse_text(text: str, depth: int | None) -> tuple[int, tuple[int, ...], tuple[Blend, ...]]:
    """Return the (depth, path, blends) that `text` says.

    Raises ProgramTextError, with the position, for malformed text, a layer outside the depth, more
    than MAX_STEPS steps and a missing or contradicted depth; ProgramError for edits that overlap.
    """
    return _Reader(text, depth).read()


class _Reader:
    """A cursor over the tokens of one text; the methods read one rule of the grammar each."""

    def __init__(self, text: str, depth: int | None) -> None:
        self.text = text
        self.tokens = self._tokenize()
        self.index = 0
        if len(self.tokens) == 1:
            self.fail(
                "empty program; give layers such as 0-4 6-29 /30, or identity", self.tokens[0]
            )
        self.depth = self._find_depth(depth)

    def _tokenize(self) -> list[_Token]:
        tokens: list[_Token] = []
        position = 0
        while position < len(self.text):
            if self.text[position].isspace():
                position += 1
                continue
            match = _TOKEN.match(self.text, position)
            if match is None:
                token = _Token("sign", self.text[position], position)
                self.fail(
                    f"unexpected character {token.text!r}; see polar_fx.program.text for the "
                    "grammar",
                    token,
                )
            tokens.append(_Token(str(match.lastgroup), match[0], position))
            position = match.end()
        tokens.append(_Token("end", "the end of the text", position))
        return tokens

    def fail(self, reason: str, token: _Token) -> NoReturn:
        raise ProgramTextError(reason, self.text, position=token.position)

    @property
    def next(self) -> _Token:
        return self.tokens[self.index]

    def take(self) -> _Token:
        token = self.next
        self.index += 1
        return token

    def accept(self, text: str) -> bool:
        """Consume the next token if it is `text`."""
        if self.next.kind == "end" or self.next.text != text:
            return False
        self.index += 1
        return True

    def expect(self, text: str, why: str) -> None:
        if not self.accept(text):
            self.fail(f"expected {text!r}, found {_shown(self.next)}; {why}", self.next)

    def _find_depth(self, depth: int | None) -> int:
        """Cut a final `/ depth` off the tokens, and settle on one depth."""
        slash = next((i for i, token in enumerate(self.tokens) if token.text == "/"), None)
        if slash is not None:
            self.index = slash + 1
            stated = self.whole("the depth", 1, high=MAX_STEPS)
            if self.next.kind != "end":
                self.fail(
                    f"unexpected {_shown(self.next)} after the depth; put /{stated} last", self.next
                )
            if depth is not None and depth != stated:
                token = self.tokens[slash + 1]
                self.fail(
                    f"the text says depth {stated}, the argument depth={depth}; make them agree",
                    token,
                )
            self.index = 0
            self.tokens[slash:] = [
                _Token("end", "the end of the program", self.tokens[slash].position)
            ]
            return stated
        if depth is None:
            self.fail(
                "unknown depth; end the text with /30, say, for a model of 30 layers, or pass "
                "depth=",
                self.tokens[-1],
            )
        return depth

    def whole(self, what: str, low: int, *, high: int | None) -> int:
        """Read a whole number within low..high."""
        token = self.next
        if token.kind != "number":
            self.fail(f"expected {what}, found {_shown(token)}; give a whole number", token)
        if not token.text.isdigit():
            self.fail(f"{what} is {token.text}; give a whole number", token)
        if len(token.text) > _MAX_DIGITS:
            self.fail(f"{what} has {len(token.text)} digits; give at most {_MAX_DIGITS}", token)
        number = int(token.text)
        if number < low or (high is not None and number > high):
            bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
            self.fail(f"{what} is {number}; give a whole number {bounds}", token)
        self.index += 1
        return number

    def layers(self) -> range:
        """Read `layer` or `layer-layer`."""
        what = f"layer of a {self.depth}-layer model"
        first = self.whole(what, 0, high=self.depth - 1)
        if not self.accept("-"):
            return range(first, first + 1)
        token = self.next
        last = self.whole(what, 0, high=self.depth - 1)
        if last < first:
            self.fail(f"range {first}-{last} descends; list descending layers one by one", token)
        return range(first, last + 1)

    def damping(self) -> float:
        token = self.take()
        if token.kind != "number" or not 0 < float(token.text) <= 1:
            self.fail(f"damping is {_shown(token)}; give a number above 0 and at most 1", token)
        return float(token.text)

    def read(self) -> tuple[int, tuple[int, ...], tuple[Blend, ...]]:
        if self.accept("identity"):
            if self.next.kind != "end":
                self.fail(
                    f"expected the end after 'identity', found {_shown(self.next)}; drop it",
                    self.next,
                )
            return self.depth, tuple(range(self.depth)), ()
        if self.next.kind == "word":
            return self.depth, *self._read_edits()
        return self.depth, *self._read_items()

    def _read_edits(self) -> tuple[tuple[int, ...], tuple[Blend, ...]]:
        edits: list[Edit] = []
        while True:
            word = self.take()
            if word.text not in (Op.SKIP, Op.REPEAT):
                known = "skip 5, repeat 10-11 x3 @0.5, or identity alone"
                self.fail(f"expected an edit, found {_shown(word)}; the edits are: {known}", word)
            layers = self.layers()
            times, damping = 2, 1.0
            if word.text == Op.REPEAT:
                times = self.whole("times", 2, high=None) if self.accept("x") else 2
                damping = self.damping() if self.accept("@") else 1.0
            edits.append(Edit(layers.start, len(layers), Op(word.text), times, damping))
            if self.next.kind == "end":
                return steps_of_segments(segments_of_edits(edits, self.depth))
            if not (self.accept(",") or self.accept(";")):
                self.fail(
                    f"unexpected {_shown(self.next)} after an edit; separate edits with a comma",
                    self.next,
                )

    def _read_items(self) -> tuple[tuple[int, ...], tuple[Blend, ...]]:
        # An explicit stack: deep nesting must not end in a RecursionError.
        frames = [_Frame(None)]
        after_item = False
        while True:
            token = self.next
            if token.kind == "number":
                layers = self.layers()
                self._append(
                    frames[-1], _Frame(None, list(layers)), times=1, damping=1.0, token=token
                )
                after_item = True
            elif token.text in ("(", "["):
                frames.append(_Frame(self.take()))
                after_item = False
            elif after_item and token.text == ",":
                self.take()
                after_item = False
            elif after_item and token.text in (")", "]"):
                self._close(frames)
            elif after_item and token.kind == "end" and len(frames) == 1:
                blends = (
                    Blend(start, stop, each) for (start, stop), each in frames[0].blends.items()
                )
                return tuple(frames[0].path), tuple(blends)
            elif after_item and token.kind == "end":
                opener = frames[-1].opener
                assert opener is not None
                self.fail(f"{opener.text!r} is never closed; close it, or drop it", opener)
            elif after_item:
                self.fail(
                    f"unexpected {_shown(token)}; separate layers, ranges and groups by spaces",
                    token,
                )
            else:
                self.fail(f"expected a layer, a range or a group, found {_shown(token)}", token)

    def _close(self, frames: list[_Frame]) -> None:
        """Read a closing bracket and what follows it, and run its body in the enclosing frame."""
        closer, opener = self.take(), frames[-1].opener
        if opener is None or (opener.text == "(") != (closer.text == ")"):
            wanted = f"{opener.text!r} at column {opener.position + 1}" if opener else "nothing"
            self.fail(f"{closer.text!r} closes {wanted}; pair ( with ) and [ with ]", closer)
        body = frames.pop()
        if closer.text == "]":
            self.expect("@", "a bracket blends one pass, as in [10-11]@0.5")
            self._append(frames[-1], body, times=1, damping=self.damping(), token=opener)
            return
        self.expect("*", "a group repeats, as in (10-11)*2 or (10-11)*3@0.5")
        times = self.whole("times", 2, high=None)
        damping = self.damping() if self.accept("@") else 1.0
        self._append(frames[-1], body, times=times, damping=damping, token=opener)

    def _append(
        self, frame: _Frame, body: _Frame, *, times: int, damping: float, token: _Token
    ) -> None:
        """Run `body` `times` times in `frame`, the first time plain unless it is the only one."""
        num_steps = len(frame.path) + len(body.path) * times
        if num_steps > MAX_STEPS:
            self.fail(f"this makes {num_steps} steps, the limit is {MAX_STEPS}; repeat less", token)
        for run in range(times):
            frame.append(body, damping if run or times == 1 else 1.0)


def _shown(token: _Token) -> str:
    return token.text if token.kind == "end" else repr(token.text)


# Printing. An item is a layer, or a blend over items that are printed already; equal text means
# equal items, so blends compare by their text alone, however deep they nest.


class _Blended(NamedTuple):
    body: str
    damping: float


_Item = int | _Blended


def format_text(steps: Iterable[Step], depth: int) -> str:
    """Return the canonical text: ascending runs as ranges, adjacent equal runs folded into groups.

    Folding goes left to right and takes the repetition that covers most items, the shortest on a
    tie. For a segmentable program that gives exactly its minimal segments.
    """
    frames: list[list[_Item]] = [[]]
    bodies: dict[str, list[_Item]] = {}
    for step in steps:
        frames += [[] for _ in range(step.opens)]
        frames[-1].append(step.layer)
        for damping in step.closes:
            items = frames.pop()
            body = _fold(items, bodies)
            bodies[body] = items
            frames[-1].append(_Blended(body, damping))
    return f"{_fold(frames[0], bodies)} /{depth}"


def _fold(items: Sequence[_Item], bodies: dict[str, list[_Item]]) -> str:
    """Return the text of `items`."""
    positions: dict[_Item, list[int]] = {}  # of each item, descending, so that passed ones pop off
    passes: dict[int, tuple[int, float]] = {}  # start of a block -> its first damped pass, damping
    for position in reversed(range(len(items))):
        item = items[position]
        positions.setdefault(item, []).append(position)
        if isinstance(item, _Blended):
            start = position - len(bodies[item.body])
            if start >= 0 and items[start:position] == bodies[item.body]:
                passes[start] = position, item.damping
    parts: list[str | range] = []
    index = 0
    while index < len(items):
        item = items[index]
        while positions[item][-1] < index:
            positions[item].pop()
        length, times = _plain_repeat(items, index, positions=positions[item])
        covered, suffix = length * times, f"*{times}"
        if index in passes:
            second, damping = passes[index]
            more = _run_length(items, second, lag=1)
            if second + 1 + more - index > covered:
                length, covered = second - index, second + 1 + more - index
                suffix = f"*{2 + more}@{damping!r}"
        if covered > 1:
            parts.append(f"({_fold(items[index : index + length], bodies)}){suffix}")
        elif isinstance(item, _Blended):
            parts.append(f"[{item.body}]@{item.damping!r}")
        elif parts and isinstance(parts[-1], range) and parts[-1].stop == item:
            parts[-1] = range(parts[-1].start, item + 1)
        else:
            parts.append(range(item, item + 1))
        index += covered
    return " ".join(part if isinstance(part, str) else _range_text(part) for part in parts)


def _plain_repeat(
    items: Sequence[_Item], index: int, *, positions: Sequence[int]
) -> tuple[int, int]:
    """Return (length, times) of the undamped repetition at `index` that covers most items."""
    best = (1, 1)
    for position in reversed(positions):  # of the item at index; ascending, index itself first
        length = position - index
        if index + 2 * length > len(items):
            break
        times = 1 + (_run_length(items, index, lag=length) // length if length else 0)
        if times > 1 and length * times > best[0] * best[1]:
            best = length, times
        if index + best[0] * best[1] == len(items):
            break
    return best


def _run_length(items: Sequence[_Item], index: int, *, lag: int) -> int:
    """Return how many items from `index` on equal the item `lag` places later."""
    end = index
    while end + lag < len(items) and items[end] == items[end + lag]:
        end += 1
    return end - index


def _range_text(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"

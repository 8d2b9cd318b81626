"""A program as a small picture: one column a layer, one row of marks."""

from ..errors import NotSegmentableError
from ..program import Op, Program, Segment

_SKIPPED, _ONCE = "·", "■"


def picture(program: Program) -> str:
    """One mark a layer: `·` skipped, `■` run once, a digit for that many times (`+` beyond 9), ten to a group.

    A second line holds the text form, a third the segments if the path has any.
    """
    runs = [program.path.count(layer) for layer in range(program.depth)]
    marks = [_SKIPPED if n == 0 else _ONCE if n == 1 else str(n) if n < 10 else "+" for n in runs]
    groups = ["".join(marks[i : i + 10]) for i in range(0, len(marks), 10)]
    share = f"{program.num_steps} steps, {program.num_steps / program.depth:.0%} of the {program.depth} layers"
    lines = [f"{' '.join(groups)}   {share}", str(program)]
    try:
        segments = program.segments()
    except NotSegmentableError:
        lines.append("no sequence of skip, keep and repeat segments runs this path")
    else:
        lines.append(" | ".join(_segment(s) for s in segments))
    return "\n".join(lines)


def _segment(segment: Segment) -> str:
    last = segment.stop - 1
    layers = str(last) if segment.num_layers == 1 else f"{segment.start}-{last}"
    times = f" x{segment.times}" if segment.op is Op.REPEAT else ""
    damping = f" @{segment.damping:g}" if segment.damping != 1.0 else ""
    return f"{segment.op} {layers}{times}{damping}"

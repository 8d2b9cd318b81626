"""Which rows of a batch run which layer when: the schedule of a pass in lock-step."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..program import Program
from ..runtime.lockstep_order import LayerCall, lockstep_calls

_TAKES_PART, _WAITS = "■", "·"


@dataclass(frozen=True)
class BatchSchedule:
    """The layer calls of one pass over rows of `programs`, in order (docs/engine.md).

    Each call serves the rows whose next step it is, and reads the layer's weights once.
    """

    programs: tuple[Program, ...]
    calls: tuple[LayerCall, ...]

    @property
    def row_steps(self) -> int:
        """Steps of all rows together."""
        return sum(program.num_steps for program in self.programs)

    @property
    def rows_a_call(self) -> float:
        """How many rows a call serves, on average."""
        return self.row_steps / len(self.calls)

    def text(self) -> str:
        """A column a call, ten to a group: its layer, and a mark for each row that takes part."""
        layers = [str(call.layer).rjust(3) for call in self.calls]
        lines = []
        for digit in range(3):
            column = "".join(layer[digit] for layer in layers)
            if column.strip():
                lines.append(("layer" if not lines else "").ljust(8) + _grouped(column))
        for row, program in enumerate(self.programs):
            marks = "".join(_TAKES_PART if row in c.rows else _WAITS for c in self.calls)
            lines.append(f"row {row}".ljust(8) + f"{_grouped(marks)}  {program}")
        lines.append(
            f"{len(self.calls)} calls for {self.row_steps} steps of {len(self.programs)} rows: "
            f"{self.rows_a_call:.1f} rows a call"
        )
        return "\n".join(line.rstrip() for line in lines)

    __str__ = text


def _grouped(text: str) -> str:
    return " ".join(text[i : i + 10] for i in range(0, len(text), 10))


def schedule(programs: Sequence[Program]) -> BatchSchedule:
    """The schedule of rows of these programs, one a row.

    Raises InputError without programs, or for programs of different depths.
    """
    if not programs:
        raise InputError("there are no programs; give one for each row")
    if len(depths := sorted({program.depth for program in programs})) > 1:
        raise InputError(f"programs of depths {depths} do not run in one batch; use one model's")
    return BatchSchedule(tuple(programs), lockstep_calls(programs))

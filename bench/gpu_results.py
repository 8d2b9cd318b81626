"""Results of the GPU benchmark: one JSON object a line, written as they are found, and the table
made of them.

Several processes append to one file. A line is written at once, and what a killed process left
half-written is passed over.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]

_HEADER = (
    "model",
    "way",
    "B",
    "slots",
    "prefill ms",
    "decode ms",
    "device ms",
    "host ms",
    "GB/s",
    "of read",
    "to HF compile",
)
# of interest beside the table only when something went wrong
_NOTES = ("model", "first", "prepared", "capture")
_MOST = 600  # characters of a line in the summary


def append(path: Path, line: Line) -> None:
    """Add a line.

    It begins a new one even where another process was killed in the middle of its own.
    """
    data = (json.dumps(line, default=str) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data
        os.write(file, data)
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, in order."""
    found = []
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ()
    ):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def speed_rows(lines: Iterable[Line]) -> list[tuple[str, ...]]:
    """Cells of the table: a row for every way that was timed, by model, batch and length of the
    slots.
    """
    lines = list(lines)
    read_gbs = max(
        (line["sum_gbs"] for line in lines if line["stage"] == "bandwidth" and "sum_gbs" in line),
        default=None,
    )
    timed = [line for line in lines if line["stage"] == "speed" and "error" not in line]

    def setting(line: Line) -> tuple[Any, ...]:
        return line["model"], line["batch"], line["length"]

    reference = {setting(line): line["decode_ms"] for line in timed if line["way"] == "HF compile"}
    order = list(dict.fromkeys(setting(line) for line in timed))
    rows = []
    for line in sorted(timed, key=lambda line: (order.index(setting(line)), line["decode_ms"])):
        other = reference.get(setting(line))
        rows.append(
            (
                line["model"],
                line["way"],
                str(line["batch"]),
                str(line["length"]),
                f"{line['prefill']['ms']:.2f}",
                f"{line['decode_ms']:.3f}",
                _number(line["device_ms"]),
                _number(line["host_ms"]),
                f"{line['gbs']:.0f}",
                f"{line['gbs'] / read_gbs:.0%}" if read_gbs else "-",
                f"{line['decode_ms'] / other:.2f}" if other else "-",
            )
        )
    return rows


def check_rows(lines: Iterable[Line]) -> list[tuple[str, ...]]:
    """Cells of the table of correctness."""
    return [
        (
            line["family"],
            line["dtype"],
            line["backend"],
            "ok" if line["ok"] else "WRONG",
            f"{line['loop']:.1e}",
            f"{line['hf_itself']:.1e}",
            f"{line['kv_law']:.1e}",
            f"{line['replay_minus_linked']:.1e}",
            str(line["captured"]),
        )
        for line in lines
        if line["stage"] == "correct" and "error" not in line
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: text to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        each = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(each).rstrip()

    return [line(header), *map(line, rows)]


def summary(lines: Sequence[Line]) -> str:
    """What was found: speed and correctness as tables, the rest line by line, errors last."""
    parts = []
    if rows := speed_rows(lines):
        parts += [*aligned(_HEADER, rows), ""]
    if rows := check_rows(lines):
        header = (
            "family",
            "dtype",
            "backend",
            "verdict",
            "to the loop",
            "HF itself",
            "KV law",
            "replay",
            "captured",
        )
        parts += [*aligned(header, rows), ""]
    shown = [
        line
        for line in lines
        if line["stage"] not in ("speed", "correct", *_NOTES) and "error" not in line
    ]
    for line in [*shown, *(line for line in lines if "error" in line)]:
        parts.append(
            json.dumps({key: value for key, value in line.items() if key != "t"}, default=str)[
                :_MOST
            ]
        )
    return "\n".join(parts) + "\n"

"""Tables of compared arms, by hand."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from paired_samples import arm
from polar_fx.errors import InputError
from polar_fx.stats.arms import IDENTITY, compare_arms
from polar_fx.stats.tables import NOTE, csv_text, markdown, write_compared


def test_markdown_by_hand() -> None:
    perfect = arm(
        "best|of",
        cells=(5, 0, 5, 0),
        oracle=True,
        format_valid=np.arange(10) > 0,
        generated_tokens=np.full(10, 7.5),
    )
    rows = compare_arms(
        [
            arm(IDENTITY, cells=(0, 0, 5, 5), steps=30, unique_layers=30),
            perfect,
            arm("bad", cells=(0, 5, 0, 5)),
        ]
    )
    lines = markdown(rows).splitlines()
    assert lines[0].startswith(
        "| task | arm | n | accuracy | gain | gained / lost | McNemar p | Holm p | steps % |"
    )
    assert lines[2] == (
        "| addition | identity | 10 | 50.0 [23.7, 76.3] | – | – | – | – | 100.0 [100.0, 100.0] "
        "| 30.0 | – | – |"
    )
    assert lines[3].startswith(
        "| addition | best\\|of (oracle) | 10 | 100.0 [72.2, 100.0] | +50.0 [+20.0, +80.0] | 5 / "
        "0 | – |"
    )
    assert lines[3].endswith("| 80.0 [80.0, 80.0] | – | 90.0 | 7.5 |")
    assert lines[4].startswith(
        "| addition | bad | 10 | 0.0 [0.0, 27.8] | −50.0 [−80.0, −20.0] | 0 / 5 | 0.0625 | 0.0625 |"
    )
    assert (
        lines[-1] == NOTE and len({line.replace("\\|", "").count("|") for line in lines[:5]}) == 1
    )


def test_a_gain_of_zero_has_no_sign() -> None:
    (row,) = compare_arms([arm("same", cells=(0, 0, 5, 5))])
    assert "| 0.0 [0.0, 0.0] | 0 / 0 | 1.0000 | 1.0000 |" in markdown([row])


def test_csv_has_full_precision_and_gaps() -> None:
    rows = compare_arms(
        [
            arm("menu, a", cells=(2, 1, 3, 1), unique_layers=20),
            arm("best", cells=(3, 0, 4, 0), oracle=True),
        ]
    )
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [(each["arm"], each["oracle"]) for each in read] == [("menu, a", "0"), ("best", "1")]
    assert float(read[0]["accuracy"]) == 5 / 7 and float(read[0]["gain_points"]) == 100 / 7
    assert (
        float(read[0]["gain_low"]) == rows[0].paired.gain.low
        and float(read[0]["unique_layers"]) == 20
    )
    assert (
        read[1]["holm_p"] == ""
        and read[1]["generated_tokens"] == ""
        and float(read[1]["step_ratio_low"]) == 0.8
    )


def test_tables_are_written(tmp_path: Path) -> None:
    files = write_compared(compare_arms([arm("menu")], resamples=50), tmp_path / "new")
    assert [each.name for each in files] == ["arms.md", "arms.csv"]
    rows = compare_arms([arm("menu")], resamples=50)
    assert files[0].read_text() == markdown(rows) and files[1].read_text() == csv_text(rows)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        write_compared(compare_arms([arm("menu")], resamples=50), tmp_path / "file" / "folder")

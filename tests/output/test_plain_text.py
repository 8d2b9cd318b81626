"""Pieces of text that messages and tables share."""

import pytest

from polar_fx.output.plain_text import count, dtype_name, first_line, ranges, size, table


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one line"), "one line"),
        (ValueError("\n  first \n second"), "first"),
        (ValueError("a\r\nb"), "a"),
        (ValueError(), "ValueError"),
        (OSError(28, "No space left"), "[Errno 28] No space left"),
        (KeyError("key"), "'key'"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_the_name_of_a_dtype() -> None:
    torch = pytest.importorskip("torch")
    assert [dtype_name(d) for d in (torch.float32, torch.bfloat16, "torch.int8", "int8")] == [
        "float32",
        "bfloat16",
        "int8",
        "int8",
    ]


def test_sizes_and_counts() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345_678, 2.5e9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "12.3 MB",
        "2.5 GB",
    ]
    assert [count(n, "layer") for n in (0, 1, 2, 1200)] == [
        "0 layers",
        "1 layer",
        "2 layers",
        "1,200 layers",
    ]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([4], "4"),
        ([0, 1, 2, 3, 5], "0-3, 5"),
        ([0, 2, 4, 6, 8], "0, 2 .. 8"),
        ([0, 2, 4], "0, 2, 4"),
        ([3, 2], "3, 2"),
    ],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_a_table() -> None:
    assert table(["name", "n"], [["a", "10"], ["long", "1"]], right=["n"]) == [
        "name   n",
        "----  --",
        "a     10",
        "long   1",
    ]

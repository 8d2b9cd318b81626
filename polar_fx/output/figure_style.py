"""How all figures look: they need matplotlib, of the extra `search`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

FORMATS = ("svg", "png")
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.7,
    "grid.color": "#E4E4E4",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "svg.hashsalt": "polar_fx",
}


@contextmanager
def style() -> Iterator[None]:
    """Settings to draw and save with; a user's own do not matter inside, and are back
    afterwards.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        yield

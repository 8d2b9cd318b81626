"""What a job shows while it works: status lines and bars on the console it is given."""

import io

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def silent_console() -> Console:
    """A console that shows nothing and leaves what others print alone."""
    # quiet alone would not do: on a terminal, rich takes over stdout while a bar is shown
    return Console(file=io.StringIO(), quiet=True)


def progress_bar(console: Console, title: str, *more: ProgressColumn) -> Progress:
    """A bar with counts and times; `more` columns stand before the times."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), *more)
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)

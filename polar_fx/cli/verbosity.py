"""How much a command says beside its results: -v, -q and POLAR_FX_LOG."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.status import Status

from ..environment import log_level
from ..output.others import hush_others
from ..output.waiting import LOGGER as WAITING

_LOGGER = "polar_fx"
_quiet = False
_shown: Status | None = None  # the line of work in progress


class _Lines(logging.Handler):
    """Log lines on stderr as it is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class _Progress(logging.Handler):
    """How far long work is: in the line of work in progress on a terminal, else as lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if _shown is not None and sys.stderr.isatty():
            _shown.update(f"{record.getMessage()} ...")
        else:
            print(self.format(record), file=sys.stderr, flush=True)


def add_verbosity_arguments(parser: argparse.ArgumentParser) -> None:
    """-v and -q."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="log what is done, and what other libraries say; twice: everything",
    )
    which.add_argument(
        "-q", "--quiet", action="store_true", help="no progress; only results and errors"
    )


def set_up(options: argparse.Namespace) -> None:
    """Show log lines of polar_fx from the level that the options, or else POLAR_FX_LOG, ask for.

    Raises InputError for an unknown level in POLAR_FX_LOG.
    """
    global _quiet
    _quiet = options.quiet
    named = log_level()
    if options.quiet:
        level = logging.ERROR
    elif options.verbose:
        level = logging.INFO if options.verbose == 1 else logging.DEBUG
    else:
        level = logging.WARNING if named is None else named
    if not options.verbose:
        hush_others()
    logger = logging.getLogger(_LOGGER)
    for old in [each for each in logger.handlers if isinstance(each, _Lines)]:
        logger.removeHandler(old)
    handler = _Lines(level)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level if level < logging.WARNING else logging.NOTSET)
    _show_waiting(level == logging.WARNING)


def _show_waiting(is_shown: bool) -> None:
    """Show how far long work is, or leave that to -v."""
    logger = logging.getLogger(WAITING)
    for old in [each for each in logger.handlers if isinstance(each, _Progress)]:
        logger.removeHandler(old)
    logger.setLevel(logging.INFO if is_shown else logging.NOTSET)
    if is_shown:
        logger.addHandler(_Progress())


def status() -> Console:
    """Where progress is shown; nowhere after -q."""
    return Console(stderr=True, highlight=False, quiet=_quiet)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that this is being done, and how far it is; on a terminal alone, unless it takes
    long.
    """
    global _shown
    with status().status(what) as shown:
        _shown = shown
        try:
            yield
        finally:
            _shown = None

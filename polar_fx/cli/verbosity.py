"""How much a command says beside its results: -v, -q and POLAR_FX_LOG."""

import argparse
import logging
import sys

from rich.console import Console

from ..environment import log_level
from ..output.others import hush_others

_LOGGER = "polar_fx"
_quiet = False


class _Lines(logging.Handler):
    """Log lines on stderr as it is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


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


def status() -> Console:
    """Where progress is shown; nowhere after -q."""
    return Console(stderr=True, highlight=False, quiet=_quiet)

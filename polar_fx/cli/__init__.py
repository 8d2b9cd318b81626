"""The command line, `python -m polar_fx COMMAND`: each command is a module here of its name.

Results go to stdout, everything else (progress, warnings, errors) to stderr. Exit status: 0 done, 1
done and found something wrong, 2 bad input, 130 interrupted. Commands import torch only when they
run.
"""

import argparse
import functools
import importlib
import json
import re
import sys
from typing import Any, NoReturn

import argcomplete

from ..environment import park_waiting_threads
from ..errors import PolarError
from ..output.suggestions import did_you_mean
from .checks import check_names
from .messages import in_options
from .verbosity import add_verbosity_arguments, set_up

COMMANDS = (
    "run",
    "chat",
    "inspect",
    "compile",
    "demo",
    "cache",
    "fit",
    "reproduce",
    "search",
    "analyze",
    "train",
    "evaluate",
    "exits",
    "export",
    "bundle",
    "serve",
    "bench",
    "families",
    "env",
)


class _Parser(argparse.ArgumentParser):
    """Says what may have been meant by a name that is unknown."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        option = re.fullmatch(r"unrecognized arguments: (--[\w-]+).*", message)
        if choice:
            message += did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif option:
            message += did_you_mean(option[1], self._option_string_actions)
        super().error(message)


@functools.cache
def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command."""
    from ..version import __version__

    parser = _Parser(
        prog="polar_fx",
        description="Run a language model by programs of its layers: skip, keep or repeat any of "
        "them.",
    )
    parser.add_argument("--version", action="version", version=f"polar_fx {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}"
    )
    found: dict[str, argparse.ArgumentParser] = {}
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = found[name] = commands.add_parser(
            name,
            help=" ".join(str(module.__doc__).partition("\n\n")[0].split()),
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument(
            "--json", action="store_true", help="print one JSON object, and nothing else, to stdout"
        )
        add_verbosity_arguments(command)
        command.set_defaults(execute=module.execute)
    return parser, found


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command and its options, not checked further; ends the process where it cannot read
    them.
    """
    parser, commands = _parser()
    argcomplete.autocomplete(parser)  # answers a shell that asks, and ends; else does nothing
    options, rest = parser.parse_known_args(argv)
    if rest:
        commands[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = read_options(argv)
    if "torch" not in sys.modules:  # which reads it when it is loaded
        park_waiting_threads()
    try:
        set_up(options)
        check_names(options)
        result: dict[str, Any] = options.execute(options)
        if options.json:
            print(json.dumps(result, indent=1))
        sys.stdout.flush()
    except PolarError as error:
        print(f"error: {in_options(str(error), options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written to
        if options.verbose:
            raise
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{place}; -v shows where", file=sys.stderr)
        return 2
    return 0 if result.get("ok", True) else 1

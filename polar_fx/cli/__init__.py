"""The command line: `python -m polar_fx run | inspect | compile | demo | cache | search | analyze |
train | evaluate | export | bundle | serve | env`.

Results go to stdout, everything else (progress, warnings, errors) to stderr. Exit status: 0 done, 1
done and found something wrong, 2 bad input, 130 interrupted. Commands import torch only when they
run.
"""

import argparse
import importlib
import json
import sys
from typing import Any

from ..errors import PolarError
from .verbosity import add_verbosity_arguments, set_up

COMMANDS = (
    "run",
    "inspect",
    "compile",
    "demo",
    "cache",
    "search",
    "analyze",
    "train",
    "evaluate",
    "export",
    "bundle",
    "serve",
    "env",
)


def _parser() -> argparse.ArgumentParser:
    from ..version import __version__

    parser = argparse.ArgumentParser(
        prog="polar_fx",
        description="Run a language model by programs of its layers: skip, keep or repeat any of "
        "them.",
    )
    parser.add_argument("--version", action="version", version=f"polar_fx {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}"
    )
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        set_up(options)
        result: dict[str, Any] = options.execute(options)
    except PolarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    if options.json:
        print(json.dumps(result, indent=1))
    return 0 if result.get("ok", True) else 1

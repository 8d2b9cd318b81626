"""Tell which of transformers' causal language models can run, each tried as a tiny random one.

Examples:
  python -m polar_fx families bart opt
  python -m polar_fx families --markdown > families.md     # all of them: some minutes
"""

import argparse
import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

from ..errors import InputError
from ..output.suggestions import did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The types to try, and the form of the answer."""
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="types of models (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Try them one after another; returns what became of each.

    Raises InputError for a type that transformers does not have.
    """
    from ..explain.families import causal_kinds, examine, markdown

    known = causal_kinds()
    for kind in options.kinds:
        if kind not in known:
            raise InputError(
                f"transformers has no causal language model of type {kind!r}"
                f"{did_you_mean(kind, known)}"
            )
    found = []
    for kind in options.kinds or known:
        found.append(examine(kind))
        if not options.json and not options.markdown:
            print(f"{kind:28} {found[-1].state:8} {found[-1].why}", flush=True)
    counts = Counter(family.state for family in found)
    total = ", ".join(f"{counts[state]} {state}" for state in ("exact", "refused", "unmade"))
    print(f"{len(found)} types: {total}", file=sys.stderr)
    if options.markdown:
        print(markdown(found), end="")
    return {"families": [asdict(family) for family in found], "counts": dict(counts)}

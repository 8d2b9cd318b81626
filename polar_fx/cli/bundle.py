"""Look at a bundle, check it, or change which programs it runs. Nothing of it is run.

Examples:
  python -m polar_fx bundle show bundle
  # all of it, as `export` printed it
  python -m polar_fx bundle verify bundle --fingerprint ed43f917...
  python -m polar_fx bundle verify bundle --any-target  # one that is for another machine
  # texts, and files with one program a line
  python -m polar_fx bundle add bundle "skip 5" menu.txt
  python -m polar_fx bundle remove bundle "skip 5"
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..output.plain_text import count, size
from .options import program_texts

if TYPE_CHECKING:
    from ..bundle import Manifest

ACTIONS = {
    "show": "what it holds",
    "verify": "check every file; exit status 1 if it may not be used",
    "add": "add programs",
    "remove": "remove programs",
}
_OPTIONS = {
    "fingerprint": ("verify",),
    "any_target": ("verify",),
    "default": ("add",),
    "programs": ("add", "remove"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="; ".join(f"{name}: {what}" for name, what in ACTIONS.items()),
    )
    parser.add_argument("folder", type=Path, help="what `export` wrote")
    parser.add_argument(
        "programs",
        nargs="*",
        metavar="FILE_OR_TEXT",
        help="add, remove: program texts, and files of them",
    )
    parser.add_argument(
        "--default",
        action="store_true",
        help="add: the first is what calls that name no program run",
    )
    parser.add_argument(
        "--fingerprint",
        metavar="SHA256",
        help="verify: what `export` printed, kept apart from the bundle",
    )
    parser.add_argument(
        "--any-target",
        action="store_true",
        help="verify: do not ask whether it is for this machine and torch",
    )


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Do it; returns what the bundle holds, and prints it or what was changed."""
    for name, actions in _OPTIONS.items():
        if getattr(options, name) and options.action not in actions:
            what = (
                "programs belong" if name == "programs" else f"--{name.replace('_', '-')} belongs"
            )
            raise InputError(
                f"{what} to `bundle {' and '.join(actions)}`, not to `bundle {options.action}`"
            )
    return {"show": _show, "verify": _verify, "add": _add, "remove": _remove}[options.action](
        options
    )


def _show(options: argparse.Namespace) -> dict[str, Any]:
    from ..bundle import read_manifest

    manifest = read_manifest(options.folder)
    if not options.json:
        regions = [f for f in manifest.files if f.region]
        rows = "any number of rows at once" if manifest.many_rows else "row by row"
        facts = {
            "model": f"{manifest.model}, {count(manifest.depth, 'layer')}, {manifest.dtype}",
            "size": f"{size(manifest.num_bytes)}, of which "
            f"{size(sum(f.num_bytes for f in regions))} are "
            f"{count(len(regions), 'compiled region')}",
            "limits": f"{count(manifest.max_length, 'token')} a row, {rows}",
            "for": f"{manifest.processor}, torch {manifest.torch.partition(' ')[0]}, "
            f"{manifest.backend}, {count(manifest.threads, 'thread')}",
            "made": f"{manifest.created} by polar_fx {manifest.polar_fx}",
            "fingerprint": manifest.fingerprint,
        }
        for name, value in facts.items():
            print(f"{name:<12} {value}")
        print(f"{count(len(manifest.programs), 'program')}, the first by default:")
        for program in manifest.programs:
            print(f"  {program}  ({count(program.num_steps, 'step')})")
    return _described(options.folder, manifest)


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    from ..bundle import BundleError, verify_bundle

    try:
        manifest = verify_bundle(
            options.folder, fingerprint=options.fingerprint, target=not options.any_target
        )
    except BundleError as error:
        if not options.json:
            print(error)
        refused = {"file": error.path, "reason": error.reason, "remedy": error.remedy}
        return {"folder": str(options.folder), "ok": False, "refused": refused}
    if not options.json:
        where = "whole" if options.any_target else "whole, and for this machine"
        print(
            f"{options.folder}: {where}; {count(len(manifest.files), 'file')}, "
            f"{size(manifest.num_bytes)}"
        )
        print(
            f"fingerprint {manifest.fingerprint}"
            + (", as it should be" if options.fingerprint else "")
        )
    return {**_described(options.folder, manifest), "ok": True}


def _add(options: argparse.Namespace) -> dict[str, Any]:
    from ..bundle import add_program, read_manifest

    before = read_manifest(options.folder)
    manifest = before
    for number, program in enumerate(_programs(options, before)):
        manifest = add_program(options.folder, program, default=options.default and number == 0)
    return _changed(options, before, manifest=manifest)


def _remove(options: argparse.Namespace) -> dict[str, Any]:
    from ..bundle import BundleError, read_manifest, remove_program

    before = read_manifest(options.folder)
    manifest, programs = before, _programs(options, before)
    if missing := [p for p in programs if p not in before.programs]:
        raise BundleError(
            options.folder,
            f"holds no program {missing[0]}",
            remedy="`bundle show` lists those that it holds",
        )
    if len(programs) == len(before.programs):
        raise BundleError(
            options.folder, "would hold no program any more", remedy="add another one first"
        )
    for program in programs:
        manifest = remove_program(options.folder, program)
    return _changed(options, before, manifest=manifest)


def _programs(options: argparse.Namespace, manifest: "Manifest") -> list[Any]:
    """The programs that are named, each once: all of them are read before one is added or
    removed.
    """
    from ..program import Program

    if not options.programs:
        raise InputError(f"name the programs to {options.action}, as texts or files of them")
    return list(
        dict.fromkeys(
            Program.parse(text, manifest.depth) for text in program_texts(options.programs)
        )
    )


def _changed(
    options: argparse.Namespace, before: "Manifest", *, manifest: "Manifest"
) -> dict[str, Any]:
    added = [p for p in manifest.programs if p not in before.programs]
    removed = [p for p in before.programs if p not in manifest.programs]
    if not options.json:
        for sign, programs in (("+", added), ("-", removed)):
            for program in programs:
                print(f"{sign} {program}")
        print(
            f"{options.folder}: {count(len(manifest.programs), 'program')}, by default "
            f"{manifest.programs[0]}"
        )
    return {
        **_described(options.folder, manifest),
        "added": list(map(str, added)),
        "removed": list(map(str, removed)),
    }


def _described(folder: Path, manifest: "Manifest") -> dict[str, Any]:
    return {
        "folder": str(folder),
        "fingerprint": manifest.fingerprint,
        "bytes": manifest.num_bytes,
        "manifest": manifest.to_dict(),
    }

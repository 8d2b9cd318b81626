"""Fingerprints of source files, so that a key changes with the code that made what it stands for.

A file counts together with what it imports from its own folder and from this one, and so on;
other modules do not count. Files are named relative to their folder: copies elsewhere have equal
fingerprints.
"""

import ast
import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

_HERE = Path(__file__).parent
_PACKAGE = __name__.rpartition(".")[0]


def digest_of_files(files: Iterable[Path], root: Path) -> str:
    """Sha256 of the files' contents and of their names relative to `root`, in any order.

    Raises OSError for a file that cannot be read and ValueError for one outside `root`.
    """
    seen = hashlib.sha256()
    for name, file in sorted({f.relative_to(root).as_posix(): f for f in files}.items()):
        content = file.read_bytes()
        seen.update(f"{name}\0{len(content)}\0".encode() + content)
    return seen.hexdigest()


def with_imports(
    files: Iterable[Path],
    folders: Collection[Path],
    *,
    passes: Path = _HERE,
    not_followed: Collection[str] = (),
) -> set[Path]:
    """The files, and the modules in `folders` that they import, directly or through each other,
    imports inside functions included.

    `passes` is where polar_fx.passes lies; of its files named in `not_followed`, the imports are
    not looked at. Raises OSError or SyntaxError for a file that cannot be read.
    """
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        if file.parent != passes or file.name not in not_followed:
            waiting += [f for f in _imported(file, passes) if f.parent in folders]
    return found


@functools.cache
def module_digest(file: Path) -> str:
    """Fingerprint of a module that defines a pass, its imports included, and of `base.py`."""
    files = with_imports((file, _HERE / "base.py"), (file.parent, _HERE))
    ours = {f for f in files if f.parent == _HERE}
    theirs = digest_of_files(files - ours, file.parent)
    return hashlib.sha256((digest_of_files(ours, _HERE) + theirs).encode()).hexdigest()


def _imported(file: Path, passes: Path) -> Iterator[Path]:
    """The files of modules that `file` names in imports, as far as they lie under its folder, the
    folders above, or `passes`.
    """
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _modules(file, passes, name=alias.name, members=())
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            yield from _modules(
                file, passes, name=name, members=[alias.name for alias in node.names]
            )


def _modules(file: Path, passes: Path, *, name: str, members: Iterable[str]) -> Iterator[Path]:
    """The files of `from name import members`: the module, or members that are modules."""
    folder, rest = file.parent, name
    if name.startswith("."):
        rest = name.lstrip(".")
        for _ in range(len(name) - len(rest) - 1):
            folder = folder.parent
    # `..passes.base` of a neighbouring package and the absolute `polar_fx.passes.base`
    own = passes.name if name.startswith("..") else _PACKAGE
    if rest == own or rest.startswith(f"{own}."):
        folder, rest = passes, rest.removeprefix(own).lstrip(".")
    if rest:
        places = [rest]
    else:  # names of a package are modules of it, or are defined in its `__init__.py`
        places = [m if (folder / f"{m}.py").is_file() else "__init__" for m in members]
    for place in places:
        candidate = folder / f"{place}.py"
        if "." not in place and candidate.is_file():
            yield candidate

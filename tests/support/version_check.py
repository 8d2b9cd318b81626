"""Whether everything that names the version of polar_fx names the same one.

    python tests/support/version_check.py v0.1.0   # and whether that is the tag of it

Needs the standard library alone.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str]:
    """The version by the file that names it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {"pyproject.toml": project["version"]}
    for name, pattern in (
        ("polar_fx/version.py", r'^__version__ = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
    ):
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        found[name] = match[1] if match else ""
    return found


def problems(tag: str | None = None) -> list[str]:
    """What does not fit, a line each; for a tag also whether CHANGELOG.md tells of the version."""
    found = versions()
    version = found["pyproject.toml"]
    wrong = [f"{name} says {other!r}, pyproject.toml {version!r}" for name, other in found.items()]
    wrong = [line for line, other in zip(wrong, found.values(), strict=True) if other != version]
    if tag is not None and tag != f"v{version}":
        wrong.append(f"the tag is {tag!r}, and the version's is 'v{version}'")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if tag is not None and f"\n## {version}" not in changes:
        wrong.append(f"CHANGELOG.md has no heading '## {version}'; rename 'Unreleased' to that")
    return wrong


if __name__ == "__main__":
    lines = problems(*sys.argv[1:2])
    print("\n".join(lines) or f"version {versions()['pyproject.toml']} everywhere")
    sys.exit(bool(lines))

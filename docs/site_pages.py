"""What the documentation site takes from outside docs/: README as its first page, the project's
other documents, and files that pages link to. A hook of mkdocs.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# documents of the repository, by their place in the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
FILES = "files/"
"""Where other files of the repository are."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
_WEB = re.compile(r"[a-z]+:|#")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents, and every file of the repository that a document links to."""
    for source, place in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    linked: set[str] = set()
    for file in files.documentation_pages():
        here = _source(file.src_uri)
        for part in _CODE.split(file.content_string)[::2]:
            linked |= {_target(here, link[2]) for link in _LINK.findall(part)}
    for name in sorted(linked - PAGES.keys()):
        if not name.startswith("docs/") and (ROOT / name).is_file():
            content = (ROOT / name).read_bytes()
            files.append(File.generated(config, f"{FILES}{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to where their targets are in the site; those to folders become text."""
    here = _source(page.file.src_uri)
    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(lambda found: _moved(found, page, here=here), p) for p in parts[::2]]
    return "".join(parts)


def _source(place: str) -> str:
    """The file of the repository that a page comes from."""
    if place.startswith(FILES):
        return place.removeprefix(FILES)
    known = {place: source for source, place in PAGES.items()}
    return known.get(place, f"docs/{place}")


def _target(here: str, link: str) -> str:
    """The file or folder of the repository that a link leads to, empty for the web."""
    if _WEB.match(link):
        return ""
    parts: list[str] = []
    for part in (PurePosixPath(here).parent / link.partition("#")[0]).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def _moved(found: re.Match[str], page: Any, *, here: str) -> str:
    image, label, link = found.groups()
    target = _target(here, link)
    if not target:
        return found[0]
    if (ROOT / target).is_dir():
        return label
    inside = target.removeprefix("docs/")
    place = PAGES.get(target, inside if target != inside else f"{FILES}{target}")
    up = "../" * page.file.src_uri.count("/")
    anchor = link.partition("#")[2]
    return f"{image}[{label}]({up}{place}{'#' + anchor if anchor else ''})"

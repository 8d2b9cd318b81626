"""Links in documents lead to files and headings that are there, and no guide is forgotten."""

import re
from pathlib import Path

import pytest

from places import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "tests/data/**/*.md", "bench/results/*.md")
    for path in ROOT.glob(pattern)
)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_CODE = re.compile(r"```.*?```", re.DOTALL)


def links(path: Path) -> list[str]:
    """Targets of the links outside blocks of code, those to the web left out."""
    text = _CODE.sub("", path.read_text(encoding="utf-8"))
    return [link for link in _LINK.findall(text) if not re.match(r"https?:|mailto:", link)]


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    text = _CODE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        place, _, anchor = link.partition("#")
        target = document.parent / place if place else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_links_are_found() -> None:
    """The test above would pass if it saw none."""
    found = links(ROOT / "README.md")
    assert {"docs/design.md", "CONTRIBUTING.md"} <= set(found)
    assert "a-new-pass" in anchors(ROOT / "CONTRIBUTING.md")
    assert len(DOCUMENTS) > 20


def test_every_document_is_linked_from_another() -> None:
    targets = {
        (path.parent / link.partition("#")[0]).resolve()
        for path in DOCUMENTS
        for link in links(path)
    }
    reached = {path for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")}
    assert not {path.name for path in reached - targets}


def test_reports_name_date_commit_and_machine() -> None:
    """They begin with them, so that a number is never without its circumstances."""
    reports = [p for p in (ROOT / "docs" / "results").glob("*.md") if p.name != "README.md"]
    assert len(reports) >= 5
    for path in reports:
        head = path.read_text(encoding="utf-8")[:1500]
        assert re.search(r"20\d\d-\d\d-\d\d", head) and re.search(r"\b[0-9a-f]{7}\b", head), path
        assert re.search(r"EPYC|Xeon|H100|H200", head), path


def test_every_document_is_in_the_navigation_of_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r": ([\w./-]+\.md)$", site, flags=re.MULTILINE))
    docs = ROOT / "docs"
    own = {"index.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"}
    assert named == own | {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}

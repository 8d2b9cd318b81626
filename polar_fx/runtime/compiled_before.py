"""Why code is compiled although the store has some for the same graph: what differs in the keys."""

from collections.abc import Iterable, Mapping

from ..backends.base import ShapeClass
from ..store import Entry
from ..store.entry import Scalar
from .code_key import VariantKey


def why_again(wanted: Iterable[VariantKey], entries: Iterable[Entry]) -> str:
    """In a clause, how the most similar code in the store differs from what is wanted, such as
    "what is there is for 1 thread, and 2 are used now"; empty where nothing was compiled before.
    """
    keys = [key.facts() for key in wanted]
    stored = [entry.facts for entry in entries]
    reasons = [
        _differences(key, facts)
        for key in keys
        for facts in stored
        if facts.get("kind") == key["kind"] and facts.get("graph") == key["graph"]
    ]
    told = [reason for reason in reasons if reason]
    if not told:
        return ""
    return f"what is on disk is {' and '.join(min(told, key=len))}"


def _differences(key: Mapping[str, Scalar], facts: Mapping[str, Scalar]) -> list[str]:
    """Each field of the key that the facts of stored code have otherwise; none for code of other
    calls of the same run, such as prefill beside decode.
    """
    differing = {name for name, value in key.items() if facts.get(name) != value}
    said: list[str] = []
    if "bucket" in differing:
        shapes = _shapes(str(key["bucket"]), str(facts.get("bucket")))
        if not shapes:
            return []
        said.append(shapes)
    if "threads" in differing:
        said.append(f"for {facts.get('threads')} compute thread(s) (now {key['threads']})")
    for name in ("dtype", "device", "program"):
        if name in differing:
            said.append(f"for {name} {facts.get(name)} (now {key[name]})")
    if "torch_version" in differing:
        now, then = (str(f.get("torch_version")).partition(" ")[0] for f in (key, facts))
        said.append(f"by torch {then} (now {now})" if now != then else "by another build of torch")
    if "target" in differing:
        said.append("for another processor")
    # passes follow from the shapes as well: regions for blocks of tokens have one more
    if "builder" in differing or ("passes" in differing and "bucket" not in differing):
        said.append("by another version of polar_fx's compiler")
    if differing & {"backend", "options"}:
        said.append("by another backend, or with other options")
    return said


def _shapes(now: str, then: str) -> str:
    """How two classes of shapes differ in rows or length; empty if only in tokens, or unread."""
    try:
        wanted, stored = ShapeClass.parse(now), ShapeClass.parse(then)
    except ValueError:
        return ""
    if (wanted.tokens is None) != (stored.tokens is None):
        return ""
    if wanted.batch != stored.batch and wanted.length == stored.length:
        return f"for {_rows(stored.batch)} (now {_rows(wanted.batch)})"
    if wanted.length != stored.length and wanted.batch == stored.batch:
        return f"for rows of {_tokens(stored.length)} (now {_tokens(wanted.length)})"
    now, then = (f"{_rows(s.batch)} of {_tokens(s.length)}" for s in (wanted, stored))
    return f"for {then} (now {now})"


def _rows(batch: int | None) -> str:
    return "one row" if batch == 1 else "several rows"


def _tokens(length: int | None) -> str:
    return "any length" if length is None else f"up to {length} tokens"

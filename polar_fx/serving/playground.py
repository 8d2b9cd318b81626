"""The page at the server's `/`: a prompt, a program, and its answer beside the identity's."""

from pathlib import Path
from typing import Any

from ..bundle import BundledModel
from ..output.markup import Markup, escaped
from ..output.page import filled, json_in_html
from ..program.strip import legend_svg

_TEMPLATE = Path(__file__).with_name("playground.html")


def playground(bundle: BundledModel, name: str) -> str:
    """The whole page for a bundle that clients call `name`: one file, which asks this server alone.

    Prompts, answers and names are text, and stay text.
    """
    parts = {
        "title": escaped(name),
        "legend": Markup(legend_svg()),
        "data": json_in_html(_data(bundle, name)),
    }
    return filled(_TEMPLATE.read_text(encoding="utf-8"), parts)


def _data(bundle: BundledModel, name: str) -> dict[str, Any]:
    """What the page's script reads."""
    programs = [
        {
            "text": str(program),
            "words": program.words,
            "steps": program.num_steps,
            "identity": program.is_identity,
            "strip": program.strip().svg(),
        }
        for program in bundle.programs
    ]
    policy = None if bundle.dispatcher is None else str(bundle.dispatcher.policy)
    return {
        "model": name,
        "about": f"{bundle.architecture}, {bundle.depth} layers",
        "programs": programs,
        "policy": policy,
        "chat": bool(getattr(bundle.tokenizer, "chat_template", None)),
        "longest": bundle.pool.max_length,
    }

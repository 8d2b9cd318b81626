"""HTML for notebooks and pages: everything is escaped unless it says that it is HTML."""

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already, and stands in a page as it is."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """A value as HTML: `Markup` unchanged, everything else as its text, escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()
) -> Markup:
    """A `<table>`; columns named in `right` are aligned to the right."""
    sides = ["right" if name in set(right) else "left" for name in head]

    def line(cells: Sequence[object], tag: str) -> str:
        shown = (
            f'<{tag} style="text-align:{side}">{escaped(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return Markup(f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>")


def preformatted(text: str) -> Markup:
    """Lines of a terminal as they are, which scroll rather than wrap."""
    return Markup(f'<pre style="overflow-x:auto">{escaped(text)}</pre>')

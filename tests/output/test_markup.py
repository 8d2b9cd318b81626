"""HTML of notebooks and pages."""

from polar_fx.output.markup import Markup, escaped, html_table, preformatted


def test_everything_but_markup_is_escaped() -> None:
    assert escaped('<b title="x">&</b>') == "&lt;b title=&quot;x&quot;&gt;&amp;&lt;/b&gt;"
    assert escaped(escaped("<")) == "&lt;", "not twice"
    assert escaped(Markup("<b>")) == "<b>" and escaped(3) == "3"


def test_tables_escape_their_cells_and_align_numbers() -> None:
    table = html_table(("name", "n"), [("<i>", 1), (Markup("<b>x</b>"), 2)], right=("n",))
    assert table.count("<tr>") == 3 and "&lt;i&gt;" in table and "<b>x</b>" in table
    assert '<td style="text-align:right">2</td>' in table


def test_lines_of_a_terminal_stay_lines() -> None:
    assert preformatted("a\n  b<").endswith(">a\n  b&lt;</pre>")

"""What records say: summaries, effects of edits, coverage by menus, figures."""

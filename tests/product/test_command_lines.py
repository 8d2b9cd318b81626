"""Every command line of polar_fx in README, guides and help is one that the command line reads, and
names programs and policies that exist. Nothing is run: what they print is held by hand, or by
`test_readme.py` where it is shown in a `console` block.

Left out by a rule: the word `…`, which stands for options that were shown above, is dropped; and
an inline mention of a command alone (`python -m polar_fx train`) need not have what it requires.
"""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from places import ROOT
from polar_fx.cli import COMMANDS, read_options
from polar_fx.cli.checks import DEFAULT_DEPTH, check_programs
from polar_fx.predictor.policy import Policy

FENCED = re.compile(r"^ *```(?P<kind>\w*)\n(?P<text>.*?)^ *```", re.DOTALL | re.MULTILINE)
SHELL = {"", "sh", "console"}
INLINE = re.compile(r"`([^`]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
ELLIPSIS = "…"
STARTS = (["python", "-m", "polar_fx"], ["polar-fx"])
FILES = (".txt",)  # of programs, one a line

# Options that documents name and that are not of polar_fx's commands, by what they are of.
OTHERS = {
    "ruff": {"--check"},
    "twine": {"--strict"},
    "pip": {"--no-deps"},
    "lm-eval": {"--model_args", "--output_path", "--use_cache"},
    "polar_run": {"--tokens", "--any-program", "--new", "--steps", "--sizes-only"},
    "bench": {"--requests", "--go", "--models"},
}


def documents() -> list[Path]:
    """README and the guides; what changed in former versions is history."""
    here = [p for p in ROOT.glob("*.md") if p.name != "CHANGELOG.md"]
    return [*sorted(here), *sorted((ROOT / "docs").rglob("*.md"))]


def lines(text: str) -> Iterator[str]:
    """The shell's lines of a text: continuations and quotes that go on are joined, and prompts
    taken away.
    """
    whole = ""
    for line in text.replace("\\\n", " ").splitlines():
        whole += line.removeprefix("$ ") if not whole else f"\n{line}"
        try:
            shlex.split(whole, comments=True)
        except ValueError:  # a quotation that is open
            continue
        yield whole
        whole = ""
    assert not whole, f"a quotation is not closed: {whole}"


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a text, without what joins and redirects them."""
    for line in lines(text):
        words: list[str] = []
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        for word in reader:
            if set(word) <= set("();<>|&"):
                yield words
                words = ["(redirected)"] if set(word) <= set("<>") else []
            else:
                words.append(word)
        yield words


def arguments(words: list[str]) -> list[str] | None:
    """What a command gives to polar_fx, or None if it runs something else."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for start in STARTS:
        if words[: len(start)] == start:
            return [word for word in words[len(start) :] if word != ELLIPSIS]
    return None


def prose(text: str) -> str:
    return FENCED.sub("", text)


def blocks(text: str) -> list[str]:
    """Those that a shell would be given; of a `console` block only what is typed."""
    found = []
    for block in FENCED.finditer(text):
        typed = block["text"]
        if block["kind"] == "console":
            typed = "\n".join(re.findall(r"^\$ .*", typed, re.MULTILINE))
        if block["kind"] in SHELL:
            found.append(typed)
    return found


def examples(command: str) -> str:
    """Of a command's help."""
    about = str(importlib.import_module(f"polar_fx.cli.{command}").__doc__)
    return re.split(r"^Examples?:\n", about, flags=re.MULTILINE)[1]


@cache
def found() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Where each command line stands, and its arguments."""
    texts = [(f"{name} --help", examples(name)) for name in COMMANDS]
    for document in documents():
        text = document.read_text(encoding="utf-8")
        mentions = [m.replace("\n", " ") for m in INLINE.findall(prose(text))]
        whole = [m for m in mentions if "polar_fx " in m or "polar-fx " in m]
        texts += [(document.name, one) for one in (*blocks(text), *whole)]
    every = [(place, arguments(words)) for place, text in texts for words in commands(text)]
    return tuple((place, tuple(given)) for place, given in every if given is not None)


def test_command_lines_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    inline = {(name,) for name in COMMANDS}
    for place, given in found():
        if given in inline:
            continue
        try:
            options = read_options(list(given))
        except SystemExit:
            pytest.fail(f"{place}: {shlex.join(given)}: {capsys.readouterr().err}")
        assert callable(options.execute)


def test_there_is_an_example_of_every_command() -> None:
    assert len(found()) > 100
    for command in COMMANDS:
        assert [given for place, given in found() if place == f"{command} --help"]


def test_programs_and_policies_of_command_lines_are_some() -> None:
    programs, policies = list[str](), list[str]()
    for _, given in found():
        if len(given) < 2:
            continue
        options = vars(read_options(list(given)))
        own = DEFAULT_DEPTH if options.get("model") in (None, "bundle") else None
        for name in ("program", "programs"):
            texts = options.get(name) or []
            texts = [texts] if isinstance(texts, str) else texts
            texts = [text for text in texts if not text.endswith(FILES)]
            check_programs(texts, own)
            programs += texts
        if options.get("policy"):
            policies.append(str(Policy.parse(options["policy"], DEFAULT_DEPTH)))
    assert len(programs) > 30 and len(policies) > 2


def test_help_pastes_as_it_stands() -> None:
    """A continuation that Python ate leaves a gap of spaces; a quotation over several lines takes
    the indentation of the help with it, which JSON alone does not mind.
    """
    for command in COMMANDS:
        for line in examples(command).splitlines():
            assert len(line) <= 100 and not re.search(r"\S {3,}--", line), line
        for line in lines(examples(command)):
            assert "\n" not in line or line.lstrip().startswith("curl "), line


def test_bodies_of_requests_are_json() -> None:
    bodies = 0
    texts = [examples(name) for name in COMMANDS]
    for document in documents():
        texts += blocks(document.read_text(encoding="utf-8"))
    for text in texts:
        for words in commands(text):
            if words[:1] == ["curl"] and "-d" in words:
                assert json.loads(words[words.index("-d") + 1])["model"] == "bundle"
                bodies += 1
    assert bodies >= 2


def options_of_commands() -> set[str]:
    """Every option that some command's help shows."""
    from polar_fx.cli import _parser

    _, parsers = _parser()
    known = {"--version"}
    for parser in parsers.values():
        known.update(parser._option_string_actions)
    return known


def test_options_that_documents_and_messages_name_are_there() -> None:
    known = options_of_commands() | set().union(*OTHERS.values())
    for document in documents():
        for mention in INLINE.findall(prose(document.read_text(encoding="utf-8"))):
            missing = set(OPTION.findall(mention)) - known
            assert not missing, f"{document.name}: {mention}"
    for path in sorted((ROOT / "polar_fx" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                missing = set(OPTION.findall(node.value)) - known
                assert not missing, f"{path.name}: {node.value}"

"""Talking with a model in a terminal: history, commands, and that a turn reads what is new."""

import functools
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polar_fx import load
from polar_fx.cli import chat as chat_command
from polar_fx.cli import main
from polar_fx.compiled import compile
from polar_fx.runtime.conversation import Conversation
from polar_fx.runtime.runner import Runner
from tiny_models import make

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama and a tokenizer of single characters that knows turns."""
    path = tmp_path_factory.mktemp("model")
    characters = {chr(c): c - 32 for c in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    make("llama").save_pretrained(path)
    return str(path)


@pytest.fixture
def opened(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiled model for all."""
    monkeypatch.setattr(chat_command, "_open", lambda options: _compiled(folder))


@functools.cache
def _compiled(folder: str) -> tuple[Any, Any]:
    model, tokenizer = load(folder)
    return compile(model, "eager", max_length=100, cache=False), tokenizer


def chat(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    lines: str,
    more: tuple[str, ...] = (),
) -> tuple[list[dict[str, Any]], str]:
    """The turns, and what stderr showed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    assert main(["chat", "--max-new-tokens", "3", "--json", *more]) == 0
    said = capsys.readouterr()
    return json.loads(said.out)["turns"], said.err


@pytest.mark.usefixtures("opened")
def test_a_second_turn_keeps_what_was_read_and_answers_as_the_whole_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "hello\nand now\n"
    first, second = chat(capsys, monkeypatch, lines=lines)[0]
    assert first["kept_tokens"] == 0 and first["read_tokens"] == len("u:hello;a:")
    assert second["kept_tokens"] >= len("u:hello;a:")
    whole = len(f"u:hello;a:{first['text']};u:and now;a:")
    assert second["kept_tokens"] + second["read_tokens"] == whole
    monkeypatch.setattr(Runner, "together", False)
    afresh = chat(capsys, monkeypatch, lines=lines)[0]
    assert [turn["text"] for turn in afresh] == [first["text"], second["text"]]
    assert [turn["kept_tokens"] for turn in afresh] == [0, 0]


@pytest.mark.usefixtures("opened")
def test_reset_forgets_and_keeps_the_system_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, said = chat(
        capsys,
        monkeypatch,
        lines="one\n\n/reset\none\n/nothing\n/exit\nnever\n",
        more=("--system", "Be brief."),
    )
    assert [turn["prompt"] for turn in turns] == ["one", "one"]
    assert turns[0]["text"] == turns[1]["text"]
    sizes = {turn["kept_tokens"] + turn["read_tokens"] for turn in turns}
    assert sizes == {len("s:Be brief.;u:one;a:")}
    assert "no command /nothing" in said and "forgotten" in said


@pytest.mark.usefixtures("opened")
def test_another_program_goes_on_with_the_history(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "one\n/program skip 9\n/program skip 1\ntwo\n"
    (first, second), said = chat(capsys, monkeypatch, lines=lines)
    assert (first["program"], second["program"]) == ("0-3 /4", "0 2-3 /4")
    assert second["kept_tokens"] == 0
    assert second["read_tokens"] == len(f"u:one;a:{first['text']};u:two;a:")
    assert "from 0 to 3" in said and "skip 1, 3 steps" in said


@pytest.mark.usefixtures("opened")
def test_interrupting_an_answer_keeps_what_came_and_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = Conversation.generate, list[int]()

    def interrupted(self: Conversation, tokens: Any, **kwargs: Any) -> Any:
        calls.append(len(tokens))
        if len(calls) > 1:
            return generate(self, tokens, **kwargs)
        kwargs["max_new_tokens"] = 2
        generate(self, tokens, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "generate", interrupted)
    first, second = chat(capsys, monkeypatch, lines="one\ntwo\n")[0]
    assert first["new_tokens"] == 2 and second["new_tokens"] == 3
    assert second["kept_tokens"] + second["read_tokens"] == (
        len(f"u:one;a:{first['text']};u:two;a:")
    )


@pytest.mark.usefixtures("opened")
def test_a_full_conversation_says_so_and_reset_makes_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, said = chat(
        capsys,
        monkeypatch,
        lines=f"12345\n{'6' * 120}\n/reset\nshort\n",
    )
    assert [turn["prompt"] for turn in turns] == ["12345", "short"]
    assert "more than the 100 of a row; /reset begins anew" in said


def test_answers_are_streamed_to_stdout_and_the_rest_to_stderr(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, _ = chat(capsys, monkeypatch, lines="one\n", more=("--model", folder))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    assert main(["chat", "--model", folder, "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert said.out == turns[0]["text"] + "\n"
    assert "0 tokens kept, 8 read in" in said.err


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_terminal_is_asked_until_ctrl_c_or_ctrl_d(
    end: type[BaseException],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = iter(["one"])

    def ask(prompt: str) -> str:
        assert prompt == "> "
        for line in said:
            return line
        raise end

    monkeypatch.setattr("builtins.input", ask)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["chat", "--max-new-tokens", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["turns"]) == 1


def test_what_cannot_be_a_chat_is_refused(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    make("llama").save_pretrained(tmp_path)
    cases = {
        ("--program", "skip 1", "--program", "skip 2"): "--program was given 2 times",
        ("--top-p", "0"): "--top-p in (0, 1]",
    }
    for given, message in cases.items():
        assert main(["chat", *given]) == 2
        assert message in capsys.readouterr().err
    assert main(["chat", "--model", str(tmp_path)]) == 2
    assert "has no chat template" in capsys.readouterr().err

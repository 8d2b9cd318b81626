"""What commands say beside their results."""

import logging
import warnings
from collections.abc import Iterator

import pytest

from polar_fx.cli import main
from polar_fx.cli.verbosity import working
from polar_fx.output.others import hush_others


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Levels and handlers as they were."""
    names = ("polar_fx", "polar_fx.waiting", "torchao", "torch.utils._pytree")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_other_libraries_are_hushed_and_their_errors_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loud = logging.getLogger("torchao.prototype")
    logging.getLogger("torchao").addHandler(logging.StreamHandler())
    hush_others()
    loud.warning("Failed to load a file that nobody needs")
    loud.error("this is serious")
    for module in ("torch.export", "transformers.models"):
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module)
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn_explicit("mine", UserWarning, "x.py", 1, "torch_of_mine")
    said = capsys.readouterr().err
    assert "nobody needs" not in said and "this is serious" in said


LEVELS = {
    (): logging.WARNING,
    ("-q",): logging.ERROR,
    ("-v",): logging.INFO,
    ("-vv",): logging.DEBUG,
}


@pytest.mark.parametrize("given", LEVELS)
def test_levels_of_log_lines(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a second command in one process says nothing twice
        assert main(["bundle", "show", "/nowhere", *given]) == 2
    capsys.readouterr()
    logged = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
    for level in logged:
        logging.getLogger("polar_fx.regions").log(level, "compiled")
    said = capsys.readouterr().err.splitlines()
    shown = [line.partition(" ")[0] for line in said]
    assert shown == [logging.getLevelName(level) for level in logged if level >= LEVELS[given]]
    assert said[-1] == "ERROR polar_fx.regions: compiled"


def test_the_environment_names_a_level_and_options_come_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLAR_FX_LOG", "debug")
    main(["bundle", "show", "/nowhere"])
    assert logging.getLogger("polar_fx").level == logging.DEBUG
    main(["bundle", "show", "/nowhere", "-q"])
    assert logging.getLogger("polar_fx").level == logging.NOTSET
    monkeypatch.setenv("POLAR_FX_LOG", "shout")
    capsys.readouterr()
    assert main(["bundle", "show", "/nowhere"]) == 2
    assert "POLAR_FX_LOG='shout' is no level" in capsys.readouterr().err


def test_env_prints_facts_for_a_bug_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLAR_FX_CACHE_LIMIT", "1GB")
    assert main(["env"]) == 0
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"polar_fx", "python", "torch", "transformers", "threads", "cache"} <= facts.keys()
    assert facts["POLAR_FX_CACHE_LIMIT"].strip() == "1GB"


def test_waiting_is_seen_unless_quiet_and_only_once(capsys: pytest.CaptureFixture[str]) -> None:
    seen = {(): "region 2 of 6", ("-q",): "", ("-v",): "INFO polar_fx.waiting: region 2 of 6"}
    for given, expected in seen.items():
        for _ in range(2):
            main(["bundle", "show", "/nowhere", *given])
        capsys.readouterr()
        with working("compiling ..."):
            logging.getLogger("polar_fx.waiting").info("region %d of %d", 2, 6)
        assert capsys.readouterr().err.strip() == expected


def test_a_terminal_shows_waiting_in_the_line_of_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["bundle", "show", "/nowhere"])
    updated: list[str] = []
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: updated.append(text))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    capsys.readouterr()
    with working("compiling ..."):
        logging.getLogger("polar_fx.waiting").info("region 2 of 6")
    assert updated == ["region 2 of 6 ..."]

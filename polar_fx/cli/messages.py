"""What the library says, as the command line says it: options where the library has arguments; and
commands to go on with.
"""

import argparse
import re
import shlex

# Arguments that mean in every command what the option of their name says. Others, such as the
# `workers` that compile, have options of their name that mean something else.
_SAME = (
    "backend",
    "device",
    "dtype",
    "max_length",
    "max_new_tokens",
    "overwrite",
    "policy",
    "predictor",
    "quantize",
    "tier",
)
_VALUE = r"'[^']*'|\[[^\]]*\]|[\w./-]*[\w/]"
_ARGUMENT = re.compile(rf"(?<![\w./-])({'|'.join(_SAME)})(?:(=)({_VALUE})?)?(?![\w=]|[/.-]\w)")


def in_options(message: str, options: argparse.Namespace) -> str:
    """The message with `max_length=512` as `--max-length 512` and `overwrite=True` as
    `--overwrite`, for arguments that the command has as options. A plain word such as "device"
    stays a word.
    """

    def option(found: re.Match[str]) -> str:
        name, equals, value = found.groups()
        if not hasattr(options, name) or value == "False" or not (equals or "_" in name):
            return found[0]
        given = "" if value in (None, "True") else f" {value.strip(chr(39))}"
        return f"--{name.replace('_', '-')}{given}"

    if hasattr(options, "no_tokenizer"):
        message = message.replace("without tokenizer=", "with --no-tokenizer")
    return _ARGUMENT.sub(option, message)


def next_command(*words: object, options: argparse.Namespace, same: tuple[str, ...] = ()) -> str:
    """A command line to be pasted: these words, and the options named `same` as they were given."""
    line = ["python", "-m", "polar_fx", *map(str, words)]
    for name in same:
        given = getattr(options, name, None)
        for value in given if isinstance(given, list) else [given]:
            line += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(line)

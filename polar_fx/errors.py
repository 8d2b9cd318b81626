"""The error catalogue: every error polar_fx raises on purpose.

Each message says what is wrong, where, which value, and what to do about it. Catch `PolarError` for
all of them; errors about a bad value are `ValueError`s as well.
"""

_MAX_SHOWN = 100  # columns of program text shown around a mistake


class PolarError(Exception):
    """Base of every error polar_fx raises on purpose."""


class ProgramError(PolarError, ValueError):
    """A program, or an argument that builds or edits one, is not valid."""


class ProgramTextError(ProgramError):
    """A program's text is malformed; the message shows the text with a caret under the mistake.

    `reason` says what is wrong, `text` is the whole text and `position` the 0-based offset in it.
    """

    def __init__(self, reason: str, text: str, position: int) -> None:
        # All three stay in args, so that the error survives pickling between search workers.
        super().__init__(reason, text, position)
        self.reason = reason
        self.text = text
        self.position = position

    def __str__(self) -> str:
        start = max(0, self.position - _MAX_SHOWN // 2)
        shown = self.text[start : start + _MAX_SHOWN]
        # One column per character, also for tabs and newlines, or the caret would miss.
        shown = "".join(char if char.isprintable() else " " for char in shown)
        caret = " " * (self.position - start) + "^"
        return f"{self.reason} (column {self.position + 1})\n  {shown}\n  {caret}"


class NotSegmentableError(ProgramError):
    """No sequence of skip, keep and repeat segments (within the given caps) runs this program."""


class ModelError(PolarError):
    """Base of errors about a model."""


class UnsupportedModelError(ModelError, ValueError):
    """The model cannot run programs of layers; the message says why and what to use instead."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


class CaptureError(ModelError):
    """Tracing a supported model failed, or the traced graph does not compute what the model
    computes.
    """


class WeightsReplacedError(ModelError):
    """The model's tensors were exchanged after it was compiled; compile it again."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No model where one was named, or no default model installed; the message says how to get
    one.
    """

    def __str__(self) -> str:  # FileNotFoundError would show its arguments as an errno
        return str(self.args[0])


class ModelWarning(UserWarning):
    """The model can be used, but something about it is likely to be a mistake."""


class InputError(PolarError, ValueError):
    """Token ids, a mask, an option of a call or a setting is not valid."""


class TrainingError(InputError):
    """Questions and their labels teach nothing: they are too few, or all alike."""


class KvOverflowError(PolarError, ValueError):
    """The tokens of a call do not fit the KV pool; nothing was written."""


class EngineFullError(PolarError):
    """More requests wait than an engine takes; try again when some are done."""


class UnknownBackendError(PolarError, ValueError):
    """No backend of that name; the message lists the known ones."""


class CacheError(PolarError):
    """Artifacts cannot be kept in their folder; nothing was left there half written."""

    def __init__(self, folder: str, reason: str, remedy: str) -> None:
        super().__init__(folder, reason, remedy)
        self.folder, self.reason, self.remedy = folder, reason, remedy

    def __str__(self) -> str:
        return (
            f"cannot keep artifacts in {self.folder}: {self.reason}; {self.remedy}, name another "
            "folder with POLAR_FX_CACHE_DIR, or, in Python, do without by cache=False"
        )


class RecordFileError(PolarError):
    """A file of search records cannot be used or written; what it holds was left as it was."""

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


class CompileError(PolarError):
    """A compiler failed, or the process it ran in ended; the message says why."""

"""Why a bundle is not written, changed or loaded."""

from os import PathLike, fspath

from ..errors import PolarError

AGAIN = "copy the bundle again from where it was made, or export it again"


class BundleError(PolarError):
    """A bundle, or one file of it, cannot be used or written: `path` names it, `reason` says why,
    `remedy` what to do.

    Nothing of a bundle that is refused was loaded or run, and nothing half written is left under
    the bundle's name.
    """

    def __init__(self, path: str | PathLike[str], reason: str, remedy: str = AGAIN) -> None:
        super().__init__(fspath(path), reason, remedy)
        self.path, self.reason, self.remedy = fspath(path), reason, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"

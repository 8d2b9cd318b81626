"""Objects of which there is no second one."""

from typing import Any, ClassVar

from ..errors import InputError


class Uncopied:
    """Raises InputError where `copy` or `pickle` would take it apart; `remedy` says what to do
    instead.
    """

    remedy: ClassVar[str] = (
        "compile the model again where it is wanted (from the artifact store that takes seconds), "
        "or export a bundle (polar_fx.export)"
    )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            f"a {type(self).__name__} cannot be copied or pickled: it holds compiled code, locks "
            f"and KV memory; {self.remedy}"
        )

"""What other libraries say without being asked, in processes of our own: commands and workers."""

import logging
import warnings

# They warn while they are imported, of what nobody who runs a program can change.
_LOUD = ("torchao", "torch.utils._pytree")
_MODULES = r"(torch|torchao|transformers|accelerate|gguf)(\.|$)"


def hush_others() -> None:
    """Show only errors of loggers that are loud when torch, torchao and transformers are imported,
    and no warnings that Python code of theirs gives about itself.

    For a process of our own; whoever imports polar_fx keeps what they have set.
    """
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=_MODULES)

"""lm-evaluation-harness on compiled models: `PolarLM`, registered as "polar_fx", and local tasks of
made questions.

Optional: `pip install 'polar_fx[harness]'`. Importing it registers the model; the command line is
`python -m polar_fx.lm_harness`.
"""

from .adapter import PolarLM
from .local_task import local_task

__all__ = ["PolarLM", "local_task"]

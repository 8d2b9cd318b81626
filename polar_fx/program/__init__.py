"""The program IR: an immutable path over a model's layers, its text form, segments and edits.

Standard library only.
"""

from .parts import MAX_STEPS, Blend, Edit, Op, Segment, Step
from .program import Program

__all__ = ["MAX_STEPS", "Blend", "Edit", "Op", "Program", "Segment", "Step"]

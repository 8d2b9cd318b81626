"""What torch leaves untyped or private, in one place and with types: operators, their schemas, and
the expressions of symbolic sizes.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch.fx import Node


class Symbol(Protocol):
    """A sympy symbol; made anew by its type and a name."""

    name: str

    def __init__(self, name: str) -> None: ...


class SizeExpression(Protocol):
    """A sympy expression over the symbols of a graph's sizes."""

    @property
    def free_symbols(self) -> set[Symbol]: ...

    def xreplace(self, rule: Mapping[Symbol, Symbol]) -> "SizeExpression": ...


def size_expression(size: torch.SymInt) -> SizeExpression:
    """The expression a symbolic size stands for."""
    return cast(Any, size).node.expr


def is_operator(node: Node) -> bool:
    """Whether it calls an overload of a torch operator, not a Python function or a module."""
    return schema(node) is not None


def schema(node: Node) -> torch.FunctionSchema | None:
    """The schema of the operator it calls; None if it calls something else."""
    target = cast(object, node.target)
    if isinstance(target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]
        # torch.library offers no public way to a schema
        return cast(Any, target)._schema
    return None

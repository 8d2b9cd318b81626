"""Search: which programs answer a question. Methods know programs and rewards only; see docs/search.md."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SearchConfig
    from .generation import Generation
    from .record_store import RecordReader, RecordStore
    from .records import Explored, SearchHeader, SearchRecord
    from .runner import Evaluator, run_searches
    from .teacher_forcing import TeacherForcing
    from .verdict import Verdict

_HOMES = {
    "SearchConfig": "config", "Generation": "generation", "RecordReader": "record_store", "RecordStore": "record_store",
    "Explored": "records", "SearchHeader": "records", "SearchRecord": "records", "Evaluator": "runner",
    "run_searches": "runner", "TeacherForcing": "teacher_forcing", "Verdict": "verdict",
}  # fmt: skip

__all__ = [
    "Evaluator",
    "Explored",
    "Generation",
    "RecordReader",
    "RecordStore",
    "SearchConfig",
    "SearchHeader",
    "SearchRecord",
    "TeacherForcing",
    "Verdict",
    "run_searches",
]


def __getattr__(name: str) -> Any:  # torch is loaded by those who judge, not by those who read records
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Search: which programs answer a question.

Methods know programs and rewards only; see docs/search.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..judge.by_generation import Generation
    from ..judge.teacher_forcing import TeacherForcing
    from ..judge.verdict import Verdict
    from .config import SearchConfig
    from .lockstep import Evaluator, run_searches
    from .records.record_file import RecordReader, RecordStore
    from .records.records import Explored, SearchHeader, SearchRecord

_HOMES = {
    "SearchConfig": ".config",
    "Generation": "..judge.by_generation",
    "RecordReader": ".records.record_file",
    "RecordStore": ".records.record_file",
    "Explored": ".records.records",
    "SearchHeader": ".records.records",
    "SearchRecord": ".records.records",
    "Evaluator": ".lockstep",
    "run_searches": ".lockstep",
    "TeacherForcing": "..judge.teacher_forcing",
    "Verdict": "..judge.verdict",
}

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


# torch is loaded by those who judge, not by those who read records
def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

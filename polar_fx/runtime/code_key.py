"""What is compiled, and the key under which it is found again.

A *variant* is compiled code for one graph and one class of shapes: a region that all programs
share, or a whole program (tier 1). Everything that could change the code is a field of its key.
"""

import functools
import hashlib
import json
import platform
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..backends.base import Backend, Region, ShapeClass
from ..environment import processor_lines
from ..output.digest import digest
from ..passes.pipeline import PassRecord
from ..passes.sources import digest_of_files, with_imports


@functools.cache
def target_of(device: torch.device) -> str:
    """The machine code's target: the processor's vector instructions, or the GPU's architecture."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        # the name as well: Inductor chooses between kernels by their time on this card
        return f"sm{major}{minor} {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return device.type
    # Inductor compiles for the very processor it runs on
    lines = processor_lines()
    flags = next(
        (line for line in lines if line.lower().startswith(("flags", "features"))),
        platform.processor(),
    )
    known = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return (
        f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} "
        f"{known}"
    )


_PACKAGE = Path(__file__).parent.parent

# Folders and files, relative to the package, that shape what the compiler is given; for whole
# programs also how steps are put together. `library/steps.py` says what a step takes and gives,
# `runtime/link.py` which regions a run calls.
_REGION_SOURCES = (
    "region_names.py",
    "backends",
    "runtime/regions.py",
    "library/symbols.py",
    "library/steps.py",
)
_WHOLE_SOURCES = ("runtime/tiers.py", "runtime/link.py", "program")


def builder_sources(kind: str, package: Path = _PACKAGE) -> set[Path]:
    """Files of `package` that turn a graph into code of that kind ("region" or "whole"), with what
    they import from passes/.

    The passes that run are no part of it, unless another file uses them: they are a field of their
    own in a key.
    """
    names = _REGION_SOURCES if kind == "region" else _REGION_SOURCES + _WHOLE_SOURCES
    found: set[Path] = set()
    for place in (package / name for name in names):
        found |= (
            set(place.rglob("*.py")) if place.is_dir() else {p for p in (place,) if p.is_file()}
        )
    # the list of passes imports every pass, whether it runs or not
    passes = package / "passes"
    sources = with_imports(
        found, (passes,), passes=passes, not_followed=("pipeline.py", "__init__.py")
    )
    return sources | set((package / "backends" / "include").glob("*"))


@functools.cache
def _builder(kind: str) -> str:
    """Fingerprint of the code here that turns graphs into code."""
    return digest_of_files(builder_sources(kind), _PACKAGE)[:16]


@dataclass(frozen=True)
class VariantKey:
    """Identifies compiled code; two keys are equal exactly when the code may be exchanged.

    `graph` is the fingerprint of what is compiled (operators, wiring, literals, operand layouts),
    `passes` the content ids of the passes run on it, `bucket` the class of shapes. transformers'
    version is no field: what it changes is the graph. `threads` is one because Inductor decides by
    it which loops to split, `builder` because our own code (`builder_sources`) decides what the
    compiler is given. Inductor's global settings are none: set them through the backend's
    `options`.
    """

    kind: str
    graph: str
    program: str
    passes: str
    bucket: str
    dtype: str
    device: str
    target: str
    backend: str
    options: str
    threads: int
    torch_version: str
    builder: str

    @classmethod
    def of(
        cls,
        kind: str,
        graph: str,
        *,
        shape: ShapeClass,
        backend: Backend,
        device: torch.device,
        dtype: torch.dtype,
        program: str = "",
        passes: tuple[str, ...] = (),
    ) -> "VariantKey":
        """The key of `graph` for `shape` by `backend` on this machine."""
        return cls(
            kind=kind,
            graph=graph,
            program=program,
            passes="+".join((*passes, *(p.content_id for p in backend.passes))),
            bucket=str(shape),
            dtype=str(dtype).removeprefix("torch."),
            device=device.type,  # not its number: a package runs on every card of its kind
            target=target_of(device),
            backend=f"{_name(type(backend))} {backend.compiler}".rstrip(),
            options=json.dumps(backend.options, sort_keys=True, default=str),
            threads=torch.get_num_threads() if device.type == "cpu" else 0,
            torch_version=f"{torch.__version__} {torch.version.git_version}",
            builder=_builder(kind),
        )

    def facts(self) -> dict[str, str | int]:
        """The fields, for the store."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """Sha256 of all fields; equal in every process."""
        return digest(self.facts())


@dataclass(frozen=True)
class RegionRecord:
    """How one region came to be: which body, for which shapes, where from, the seconds it took and
    its bytes on disk.

    `source` is "compiled" or "loaded" (from the artifact store). `passes` ran on its graph, those
    of the backend last; none if it was loaded.
    """

    body: str
    shapes: str
    seconds: float
    source: str = "compiled"
    num_bytes: int = 0
    passes: tuple[PassRecord, ...] = ()


def _name(kind: type[Backend]) -> str:
    return (
        kind.name
        if kind.__module__.startswith("polar_fx.")
        else f"{kind.__module__}.{kind.__qualname__}"
    )


class VariantCache:
    """Loaded variants in memory, the least recently used dropped when their bytes exceed
    `limit_bytes`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held: OrderedDict[VariantKey, tuple[Region, int]] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: VariantKey) -> Region | None:
        """The variant, now the most recently used."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def put(self, key: VariantKey, region: Region, *, num_bytes: int) -> list[VariantKey]:
        """Keep a variant; returns the keys dropped for it, never its own."""
        with self._lock:
            self._held[key] = (region, num_bytes)
            self._held.move_to_end(key)
            dropped = []
            while self.num_bytes > self.limit_bytes and len(self._held) > 1:
                dropped.append(self._held.popitem(last=False)[0])
            return dropped

    def drop(self, key: VariantKey) -> None:
        """Forget a variant, if it is there."""
        with self._lock:
            self._held.pop(key, None)

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(size for _, size in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

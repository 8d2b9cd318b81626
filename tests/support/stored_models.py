"""Tiny models compiled with an artifact store, and a backend that needs no compiler.

Shape legend: V vocabulary.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from polar_fx.backends import AotInductorBackend, EagerBackend, PersistentBackend, Region
from polar_fx.compiled import CompiledModel, compile
from polar_fx.store import ArtifactStore
from tiny_models import make, prompts

LENGTH = 63


PROGRAM = "0 (1-2)*2@0.5 3"


def compile_for(
    model: PreTrainedModel, store: ArtifactStore | bool, **options: Any
) -> CompiledModel:
    return compile(
        model, **{"backend": "aot_inductor", "max_length": LENGTH, "cache": store, **options}
    )


@torch.no_grad()
def answer_of(compiled: CompiledModel, program: str = PROGRAM, *, tokens: int = 9) -> Tensor:
    """[3, V]: logits of a prompt's last token and of two decoded ones."""
    chosen = compiled.resolve(program)
    with compiled.session(chosen, 1) as session:
        first = compiled.prefill(chosen, session, prompts(tokens))[0]
        return torch.stack(
            [first, *(compiled.decode(chosen, session, torch.tensor([t]))[0] for t in (5, 7))]
        )


def sources_of(compiled: CompiledModel) -> list[str]:
    return [r.source for r in compiled.regions.records]


def kinds_in(store: ArtifactStore) -> list[str]:
    return sorted(str(e.facts["kind"]) for e in store.entries())


def reopened(store: ArtifactStore) -> ArtifactStore:
    """The same folder, as another process opens it."""
    return ArtifactStore(store.root, limit_bytes=0)


def in_another_process(root: str) -> None:
    """What a test runs in a child process: prints an answer's digest, and what was made for it."""
    compiled = compile_for(make("llama"), ArtifactStore(Path(root), limit_bytes=0))
    answer = hashlib.sha256(answer_of(compiled).numpy().tobytes()).hexdigest()
    print(json.dumps([answer, compiled.library.is_traced, sources_of(compiled)]))


class GraphBackend(PersistentBackend):
    """Keeps the exported graphs themselves: what `AotInductorBackend` does, without a compiler.

    Counts what it is asked.
    """

    name: ClassVar[str] = "graphs"
    needs_shapes: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.built: list[Path] = []
        self.loaded = 0

    def compile_region(self, body: GraphModule, example: Sequence[Tensor], dynamic: Any) -> Region:
        raise AssertionError("a persistent backend exports, builds and loads")

    def export(
        self, body: GraphModule, example: Sequence[Tensor], dynamic: Any, folder: Path
    ) -> None:
        AotInductorBackend().export(body, example, dynamic, folder)

    def build(self, folder: Path) -> None:
        self.built.append(folder)
        shutil.copy(folder / "graph.pt2", folder / "region.pt2")

    def load(self, files: Mapping[str, Path]) -> Region:
        self.loaded += 1
        return EagerBackend().compile_region(
            torch.export.load(files["region.pt2"]).graph_module, [], []
        )


@functools.cache
def eager_model() -> CompiledModel:
    return compile_for(make("llama"), False, backend="eager")

"""TensorRT regions: the decoding of one row as one engine a layer; of others, the parts that
multiply by weights as engines, attention and KV writes between them in torch.

The adapter around torch_tensorrt; nothing else in the project touches it. Written against the
sources of 2.11 to 2.14; no engine was ever built by the project itself (docs/tensorrt.md).

Shape legend: B batch, T tokens.
"""

import importlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ...environment import cache_dir
from ...errors import CompileError, InputError
from ...output.plain_text import first_line
from ...passes.base import Pass
from ..aot_inductor import GRAPH
from ..base import Dynamic, PersistentBackend, Region
from ..specialize import example_size, example_values, graph_of, like, save, specialize
from .tensorrt_graph import engines, split_for_engines, whole_engine, written_slots

BINDINGS = "engines.json"
_PACKAGE = "torch-tensorrt"

log = logging.getLogger("polar_fx.tensorrt")

# A part must not be taken apart once more, and TensorFloat-32 is not asked for.
_SETTINGS: Mapping[str, Any] = {
    "min_block_size": 1,
    "require_full_compilation": True,
    "disable_tf32": True,
}
# Ours, beside torch_tensorrt's settings: the largest sizes engines are built for, and operators to
# keep in torch, and whether decoding layers are one engine.
_OWN: Mapping[str, Any] = {
    "max_batch": 8,
    "max_tokens": 512,
    "torch_executed_ops": (),
    "whole_decode": None,
}
# the first version whose engines write keys and values in place
_IN_PLACE = (2, 14)
_LEAST = {"max_batch": 4, "max_tokens": 128}


class TensorRTBackend(PersistentBackend):
    """Each region as TensorRT engines, one set per shape class; weights are operands of the
    engines, so layers share them.

    `options` are settings of `torch_tensorrt.dynamo.compile`, and `max_batch` (8), `max_tokens`
    (512), the most rows and tokens of one call, `torch_executed_ops`, names such as "aten::gelu"
    of operators to keep out of engines, and `whole_decode`, whether a layer that decodes one row is
    one engine: True, False, or None (the default), which tries it where torch_tensorrt writes keys
    and values in place, from 2.14 on, and takes the layer apart where it does not work.

    Raises CompileError if torch_tensorrt is missing, is for another torch, or cannot be imported,
    and if there is no GPU; InputError for limits that are too small, and for `whole_decode` where
    it cannot be.
    """

    name: ClassVar[str] = "tensorrt"
    needs_shapes: ClassVar[bool] = True
    by_address = False
    # engines are told the sizes of a prompt when they are launched
    captures_prompts: ClassVar[bool] = False
    # TensorRT chooses kernels by timing them: one build at a time on a GPU
    in_workers: ClassVar[bool] = False

    def __init__(
        self, options: Mapping[str, Any] | None = None, passes: Sequence[Pass] = ()
    ) -> None:
        found = find_library()
        self._library, self._versions = found.module, found.versions
        super().__init__({**_OWN, **(options or {})}, passes)
        self._in_place = tuple(map(int, found.version.split(".")[:2])) >= _IN_PLACE
        whole = self.options["whole_decode"]
        if whole not in (None, True, False):
            raise InputError(f"whole_decode must be True, False or None, got {whole!r}")
        if whole and not self._in_place:
            raise InputError(
                f"torch_tensorrt {found.version} does not write keys and values in place, which "
                "whole_decode needs: leave it out, or install 2.14 or newer"
            )
        for name, least in _LEAST.items():
            if not isinstance(self.options[name], int) or self.options[name] < least:
                raise InputError(
                    f"{name} of the tensorrt backend must be at least {least}, got "
                    f"{self.options[name]!r}"
                )

    @property
    def _largest(self) -> dict[str, int]:
        return {"batch": self.options["max_batch"], "tokens": self.options["max_tokens"]}

    @property
    def compiler(self) -> str:
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{self._versions}, {gpu.name} with {gpu.multi_processor_count} multiprocessors"

    def export(
        self, body: GraphModule, example: Sequence[Tensor], dynamic: Dynamic, folder: Path
    ) -> None:
        _check_device(example[0].device)
        save(specialize(body, example, dynamic=dynamic, largest=self._largest), folder / GRAPH)

    def build(self, folder: Path) -> None:
        graph_module, keep = self._graph(folder / GRAPH), self.options["torch_executed_ops"]
        asked = self.options["whole_decode"]
        tries = self._in_place if asked is None else asked
        whole = whole_engine(graph_module, keep) if tries else None
        if whole is not None:
            try:
                self._build(whole, folder, whole=True)
            except CompileError as error:
                if asked:
                    raise
                log.warning("a layer is taken apart: %s", error)
            else:
                return
        self._build(split_for_engines(graph_module, keep), folder, whole=False)

    def _build(self, split: GraphModule, folder: Path, *, whole: bool) -> None:
        """Write the engines of a region, and what they are given."""
        bindings = {}
        for name, exported in export_engines(split, self._largest).items():
            made = self._lower(exported, name)
            (folder / f"{name}.engine").write_bytes(made.serialized_engine)
            operands = [n.name for n in exported.graph.find_nodes(op="placeholder")]
            bindings[name] = {
                "inputs": list(made.input_binding_names),
                "outputs": list(made.output_binding_names),
                "operands": [operands.index(n) for n in made.input_binding_names],
                # output: the operand whose memory it is, and what kind of that
                "aliased": dict(getattr(made, "aliased_io", None) or {}),
            }
        described = {"whole": whole, "engines": bindings}
        (folder / BINDINGS).write_text(json.dumps(described), encoding="utf-8")

    def load(self, files: Mapping[str, Path]) -> Region:
        described = json.loads(files[BINDINGS].read_text(encoding="utf-8"))
        part = whole_engine if described["whole"] else split_for_engines
        graph_module = part(self._graph(files[GRAPH]), self.options["torch_executed_ops"])
        assert graph_module is not None, "it was whole when it was built"
        for name, bound in described["engines"].items():
            aliased = {output: tuple(of) for output, of in bound["aliased"].items()}
            module = self._library.dynamo.runtime.TorchTensorRTModule(
                serialized_engine=files[f"{name}.engine"].read_bytes(),
                input_binding_names=bound["inputs"],
                output_binding_names=bound["outputs"],
                name=name,
                **({"aliased_io": aliased} if aliased else {}),
            )
            in_place = {of for of, _ in aliased.values()}
            written = [n in in_place for n in bound["inputs"]]
            setattr(graph_module, name, _Engine(module, bound["operands"], written=written))
        batch, tokens = self._largest.values()

        def run(operands: list[Tensor]) -> Sequence[Tensor]:
            given = operands[0].shape  # [B, T] or [B, T, d]
            if given[0] > batch or given[1] > tokens:
                raise InputError(
                    f"{given[0]} rows of {given[1]} tokens are more than the engines were built "
                    f"for ({batch} rows, {tokens} tokens); use a smaller prefill_chunk, or "
                    "TensorRTBackend({'max_batch': ..., 'max_tokens': ...})"
                )
            return graph_module(*operands)

        return run

    def _graph(self, path: Path) -> GraphModule:
        return graph_of(torch.export.load(path), self.passes)

    def _lower(self, exported: ExportedProgram, name: str) -> Any:
        """The one engine of a part, as torch_tensorrt's module. Raises CompileError."""
        settings = {
            **_SETTINGS,
            "timing_cache_path": str(cache_dir() / "tensorrt" / "timing.cache"),
            **self.options,
        }
        settings = {k: v for k, v in settings.items() if k not in _OWN}
        slots = written_slots(exported.graph)
        library, (results,) = self._library.dynamo, exported.graph.output_node().args
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the library and torch about their own internals
                inputs = tuple(self._library.Input(**described) for described in profile(exported))
                # nested as the exported call is
                compiled = library.compile(exported, arg_inputs=[inputs], **settings)
            made = [
                m for m in compiled.modules() if isinstance(m, library.runtime.TorchTensorRTModule)
            ]
            outputs = len(results) + len(slots)  # type: ignore[arg-type]
            if [len(m.output_binding_names) for m in made] != [outputs]:
                raise ValueError(f"it made {len(made)}")
            aliased: Mapping[str, Any] = getattr(made[0], "aliased_io", None) or {}
            if sorted(of for of, _ in aliased.values()) != sorted(slots):
                raise ValueError(f"of {slots} it writes {aliased} in place")
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            part = "a whole layer (TensorRTBackend({'whole_decode': False}) takes it apart)"
            raise CompileError(
                f"torch_tensorrt does not make one engine of {part if slots else name} "
                f"({reason}); keep an operator out of the engines with "
                "TensorRTBackend({'torch_executed_ops': ['aten::gelu']}), say, or use "
                "backend='inductor'"
            ) from error
        return made[0]


class _Engine(torch.nn.Module):
    """A loaded engine as the function that its part of the graph was: tensors to a tuple. It is
    given the operands of these numbers; `written` says which of them it writes.
    """

    def __init__(
        self, module: Callable[..., Any], operands: Sequence[int], *, written: Sequence[bool]
    ) -> None:
        super().__init__()
        self.module, self.operands, self.written = module, operands, written

    def forward(self, *values: Tensor) -> Sequence[Tensor]:
        given = []
        for number, is_written in zip(self.operands, self.written, strict=True):
            value = values[number]
            if is_written and not value.is_contiguous():  # what is written would be a copy
                raise InputError(
                    f"an engine writes slots that are contiguous, not of strides {value.stride()}; "
                    "use TensorRTBackend({'whole_decode': False})"
                )
            given.append(value.contiguous())
        results = self.module(*given)
        return (results,) if isinstance(results, Tensor) else results


def export_engines(
    graph_module: GraphModule, largest: Mapping[str, int]
) -> dict[str, ExportedProgram]:
    """The engine parts of a region that was split, each for the region's shape class and up to the
    largest sizes.
    """
    names = dict(
        zip(map(str, example_values(graph_module)[0].shape), ("batch", "tokens"), strict=False)
    )

    def varying(value: Tensor) -> dict[int, str]:
        """The names of a value's sizes that may vary, by axis."""
        sizes = enumerate(value.shape)
        return {axis: names[str(size)] for axis, size in sizes if isinstance(size, torch.SymInt)}

    found = {}
    for name, engine in engines(graph_module).items():
        values = example_values(engine)
        example, dynamic = list(map(like, values)), list(map(varying, values))
        found[name] = specialize(engine, example, dynamic=dynamic, largest=largest)
    return found


def profile(exported: ExportedProgram) -> list[dict[str, Any]]:
    """Dtype and shape of each operand of an engine; where sizes may vary, the least, the best
    served and the largest shape.
    """
    found = []
    for value in example_values(exported.graph_module):
        least, best, most = list(value.shape), list(value.shape), list(value.shape)
        for i, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                allowed = exported.range_constraints[size.node.expr]
                least[i], most[i] = int(allowed.lower), int(allowed.upper)
                best[i] = example_size(size)
        shape = (
            {"shape": tuple(least)}
            if least == most
            else {"min_shape": tuple(least), "opt_shape": tuple(best), "max_shape": tuple(most)}
        )
        found.append({**shape, "dtype": value.dtype})
    return found


def _check_device(device: torch.device) -> None:
    if device != torch.device("cuda", torch.cuda.current_device()):
        raise InputError(
            "the tensorrt backend builds for the current GPU, "
            f"cuda:{torch.cuda.current_device()}, but the model is on {device}; move the model "
            "there, or call torch.cuda.set_device first"
        )


@dataclass(frozen=True)
class FoundLibrary:
    """torch_tensorrt: the module, its version, and that of the TensorRT which it builds with."""

    module: Any
    version: str
    tensorrt: str

    @property
    def versions(self) -> str:
        """What decides what is built, for keys."""
        return f"torch_tensorrt {self.version}, tensorrt {self.tensorrt}"


def find_library() -> FoundLibrary:
    """The library that is installed.

    Raises CompileError if it cannot be used here.
    """
    minor = ".".join(torch.__version__.split(".")[:2])
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise CompileError(
            "backend='tensorrt' needs torch_tensorrt, which is not installed; run `pip install "
            "polar_fx[tensorrt]` on a Linux machine with an NVIDIA GPU, or use backend='inductor'"
        ) from None
    if ".".join(version.split(".")[:2]) != minor:
        raise CompileError(
            f"torch_tensorrt {version} is made for torch {'.'.join(version.split('.')[:2])}, but "
            f"torch is {torch.__version__}; run `pip install 'torch-tensorrt=={minor}.*'`, or use "
            "backend='inductor'"
        )
    if not torch.cuda.is_available():  # before the import, which fails without a driver
        raise CompileError(
            "backend='tensorrt' needs an NVIDIA GPU, and torch sees none "
            "(torch.cuda.is_available() is False); use backend='aot_inductor' on the CPU"
        )
    try:
        library = importlib.import_module("torch_tensorrt")
        return FoundLibrary(library, version, importlib.import_module("tensorrt").__version__)
    except Exception as error:
        # it raises plain Exceptions where a shared library of TensorRT is missing
        raise CompileError(
            f"torch_tensorrt {version} is installed but does not import: {first_line(error)}; "
            "install it again together with TensorRT (`pip install --force-reinstall "
            f"torch-tensorrt=={version}`)"
        ) from error

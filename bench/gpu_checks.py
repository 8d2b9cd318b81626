"""What must be right before a time means anything: programs, caches and graphs against the model
itself; files; tests.

Tiny models of the test suite with random weights. Shape legend: B batch, T tokens.
"""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import polar_fx
from gpu_worker import Worker
from polar_fx import CompiledModel, Program
from polar_fx.capture.support import find_stack, shared_view
from polar_fx.questions.question import EncodedQuestion
from polar_fx.search import TeacherForcing
from tiny_models import make

ROOT = Path(__file__).parent.parent
# the others by the eager backend, which compiles nothing
_INDUCTOR_TOO = ("llama", "qwen2_moe", "gemma3_text", "gpt2")
_GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest logit


def tiny(worker: Worker, family: str, *, dtype: torch.dtype) -> Any:
    """The test suite's tiny model of a family, on the device."""
    return make(family).to(dtype).to(worker.device)  # type: ignore[arg-type]


def reordered(model: Any, path: Sequence[int]) -> Any:
    """The model itself with its layers in another order, weights shared: a plain loop over them."""
    view = shared_view(model, model.config._attn_implementation)
    name = find_stack(view)
    parent, _, last = name.rpartition(".")
    stack = cast(nn.ModuleList, view.get_submodule(name))
    setattr(view.get_submodule(parent), last, nn.ModuleList([stack[i] for i in path]))
    inner = [cast(Any, m).config for m in view.modules() if hasattr(m, "config")]
    for config in {
        id(c): c for c in (view.config, view.config.get_text_config(decoder=True), *inner)
    }.values():
        for field in ("num_hidden_layers", "n_layer"):
            if field in config.__dict__:
                setattr(config, field, len(path))
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in path]
    return view


def correct(worker: Worker, families: Sequence[str]) -> None:
    """Programs of each family in fp32 and bf16, interpreted and compiled."""
    dtypes = (torch.float32,) if worker.tiny else (torch.float32, torch.bfloat16)
    for family, dtype in [(family, dtype) for dtype in dtypes for family in families]:
        for backend in (
            ("eager", "inductor") if family in _INDUCTOR_TOO and not worker.tiny else ("eager",)
        ):
            about = {"family": family, "dtype": str(dtype)[6:], "backend": backend}
            with worker.attempt("correct", **about), torch.no_grad():
                start = time.perf_counter()
                found = _compared(worker, family, dtype=dtype, backend=backend)
                worker.say(
                    "correct", **about, **found, seconds=round(time.perf_counter() - start, 1)
                )


def _compared(worker: Worker, family: str, *, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Largest differences, as shares of the largest logit, over six programs.

    `loop` and `hf_itself`: ours and the model's own layers in that order, both to those layers in
    fp32; `together`: rows of all six in one batch, captured and not. `kv_law`: decoding token by
    token to one pass. `replay_minus_linked`: decodes by replayed graphs to linked ones; must be
    nothing at all.
    """
    model, wide = tiny(worker, family, dtype=dtype), tiny(worker, family, dtype=torch.float32)
    compiled = polar_fx.compile(model, backend, max_length=47, cache=False, workers=0)
    depth, pick = compiled.depth, random.Random(0)
    paths = [[*range(depth)], [*range(1, depth)], [0, 1, 1, *range(2, depth)]]
    for _ in range(3):
        paths.append([pick.randrange(depth) for _ in range(pick.randint(2, 2 * depth))])
    ids = torch.randint(3, 90, (1, 21), generator=torch.Generator().manual_seed(1)).to(
        worker.device
    )
    worst: dict[str, float] = {
        "loop": 0.0,
        "hf_itself": 0.0,
        "kv_law": 0.0,
        "replay_minus_linked": 0.0,
        "together": 0.0,
    }

    def note(name: str, got: Tensor, *, want: Tensor, scale: float = 1.0) -> None:
        worst[name] = max(worst[name], float((got - want).abs().max()) / scale)

    for path in paths:
        program = Program.from_path(tuple(path), depth)
        true = reordered(wide, path)(input_ids=ids, use_cache=False).logits[0].float()
        scale = float(true.abs().max()) or 1.0
        got = compiled.forward(ids, program=program)[0].float()
        note("loop", got, want=true, scale=scale)
        note(
            "hf_itself",
            reordered(model, path)(input_ids=ids, use_cache=False).logits[0].float(),
            want=true,
            scale=scale,
        )
        replayed = _decoded(compiled, program, ids=ids)
        kept, compiled.graphs = compiled.graphs, None
        linked = _decoded(compiled, program, ids=ids)
        compiled.graphs = kept
        note("replay_minus_linked", replayed, want=linked)
        note("kv_law", replayed, want=got[14:21], scale=scale)
    for got, want, scale in _together(compiled, paths, wide=wide, ids=ids):
        note("together", got, want=want, scale=scale)
    found: dict[str, Any] = {"ragged": _ragged(compiled, worker.device)}
    if dtype == torch.float32:  # in bf16 rounding decides between tokens whose logits are close
        options = {"max_new_tokens": 8, **_GREEDY}
        found["same_tokens"] = bool(
            (compiled.generate(ids, **options) == model.generate(ids, **options)).all()
        )
    limit = max(_TOLERANCE[dtype], 3 * worst["hf_itself"])
    largest = max(worst["loop"], worst["kv_law"], worst["together"], found["ragged"])
    right = largest < limit and worst["replay_minus_linked"] == 0
    return {
        "ok": right and found.get("same_tokens", True),
        **worst,
        **found,
        **_captures(compiled),
    }


def _captures(compiled: CompiledModel) -> dict[str, Any]:
    """How many graphs were captured, and why two of the others were not."""
    records = compiled.graphs.records if compiled.graphs is not None else ()
    reasons = [record.reason for record in records if record.reason]
    return {"captured": len(records) - len(reasons), "not_captured": reasons[:2]}


def _ragged(compiled: CompiledModel, device: torch.device) -> float:
    """Largest difference of a padded row to the row alone, as a share of its largest logit."""
    rows = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(rows)
    mask[1, :4] = 0
    alone = compiled.forward(rows[1:2, 4:])[0].float()
    padded = compiled.forward(rows, mask)[1, 4:].float()
    return float((padded - alone).abs().max() / alone.abs().max())


def _decoded(compiled: CompiledModel, program: Program, *, ids: Tensor) -> Tensor:
    """Logits of the last seven tokens: the first of them by a prefill of what comes before, six by
    decoding.
    """
    with compiled.session(program, 1) as session:
        logits = [compiled.prefill(program, session, [ids[0, :15]])[0]]
        logits += [compiled.decode(program, session, ids[:, i])[0].clone() for i in range(15, 21)]
    return torch.stack(logits).float()


def _together(
    compiled: CompiledModel, paths: Sequence[Sequence[int]], *, wide: Any, ids: Tensor
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Logits of the last seven tokens of rows that run all these paths in lock-step, those of the
    layers in that order, and the largest of those; first captured, then not.
    """
    runner, kept, count = compiled.runner, compiled.graphs, len(paths)
    programs = [Program.from_path(tuple(path), compiled.depth) for path in paths]
    for graphs in (compiled.graphs, None):
        compiled.graphs = graphs
        with runner.open_together(programs) as session:
            logits = [torch.stack(runner.prefill(session, [ids[0, :15]] * count))]
            for i in range(15, 21):
                logits.append(runner.decode(session, ids[0, i].repeat(count)))
        for row, path in enumerate(paths):
            true = reordered(wide, path)(input_ids=ids, use_cache=False).logits[0].float()
            got = torch.stack(logits)[:, row].float()
            yield got, true[14:], float(true.abs().max()) or 1.0
    compiled.graphs = kept


def search(worker: Worker) -> None:
    """Verdicts by teacher forcing about answers that the model itself generated: the identity must
    be right.
    """
    compiled = polar_fx.compile(
        tiny(worker, "llama", dtype=torch.float32), "eager", max_length=63, cache=False
    )
    programs = [compiled.resolve(text) for text in ("identity", "skip 1", "repeat 2 x2")]
    pick, pairs = random.Random(1), []
    for i in range(6):
        prefix, prompt = (5, 6, 7) if i % 2 else (), tuple(pick.randrange(3, 90) for _ in range(9))
        whole = torch.tensor([prefix + prompt]).to(worker.device)
        answer = compiled.generate(whole, max_new_tokens=3, **_GREEDY)[0, whole.shape[1] :]
        question = EncodedQuestion(f"q{i}", prefix, prompt, (tuple(answer.tolist()),))
        pairs += [(question, program) for program in programs]
    start = time.perf_counter()
    verdicts = TeacherForcing(compiled).evaluate(pairs)
    milliseconds = round(1e3 * (time.perf_counter() - start), 1)
    right = [bool(v.correct) for v in verdicts[:: len(programs)]]
    worker.say("search", ok=all(right), pairs=len(pairs), ms=milliseconds, identity_right=right)


def aoti(worker: Worker) -> None:
    """Regions as files: made in this process and by two others, run, captured, and loaded again
    without compiling.
    """
    for workers, dtype in (
        ((0, torch.float32),) if worker.tiny else ((0, torch.float32), (2, torch.bfloat16))
    ):
        about = {"workers": workers, "dtype": str(dtype)[6:]}
        with worker.attempt("aoti", **about), torch.no_grad():
            start, model = time.perf_counter(), tiny(worker, "llama", dtype=dtype)
            compiled = polar_fx.compile(model, "aot_inductor", max_length=47, workers=workers)
            found = _as_interpreted(worker, compiled, model=model)
            seconds, start = round(time.perf_counter() - start, 1), time.perf_counter()
            again = polar_fx.compile(model, "aot_inductor", max_length=47, workers=0)
            again.generate(_prompt(worker), max_new_tokens=6, **_GREEDY)
            warm = round(time.perf_counter() - start, 2)
            worker.say(
                "aoti",
                **about,
                **found,
                seconds=seconds,
                warm_seconds=warm,
                warm_compiled=len(again.compilations),
            )


def bundle(worker: Worker) -> None:
    """A bundle written on this device, loaded and run on it."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        start, place = time.perf_counter(), Path(folder) / "bundle"
        model = tiny(worker, "llama", dtype=torch.float32)
        compiled = polar_fx.compile(model, "aot_inductor", max_length=47, workers=0)
        polar_fx.export(compiled, place, programs=["skip 1"])
        loaded, _ = polar_fx.load(place)
        found = _as_interpreted(worker, cast(Any, loaded), model=model, program="skip 1")
        worker.say("bundle", **found, seconds=round(time.perf_counter() - start, 1))


def _prompt(worker: Worker) -> Tensor:
    return torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(3)).to(
        worker.device
    )


def _as_interpreted(
    worker: Worker, compiled: CompiledModel, *, model: Any, program: str = "identity"
) -> dict[str, Any]:
    """Does `compiled` give what the eager backend gives? In bf16 only the logits are judged."""
    plain = polar_fx.compile(model, "eager", max_length=47, cache=False)
    ids, options = _prompt(worker), {"max_new_tokens": 6, "program": program, **_GREEDY}
    same = bool((compiled.generate(ids, **options) == plain.generate(ids, **options)).all())
    want = plain.forward(ids, program=program).float()
    apart = float(
        (compiled.forward(ids, program=program).float() - want).abs().max() / want.abs().max()
    )
    captures = _captures(compiled)
    return {
        "ok": apart < _TOLERANCE[plain.dtype]
        and (same or plain.dtype != torch.float32)
        and not captures["not_captured"],
        "apart": apart,
        "same_tokens": same,
        **captures,
    }


def tests(worker: Worker) -> None:
    """The tests of CUDA graphs that need a GPU (without one: a few of those that do not)."""
    chosen = (
        "tests/runtime/test_cuda_graphs_gpu.py"
        if worker.on_gpu
        else "tests/runtime/test_cuda_graphs.py"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--tb=line",
    ]
    run = subprocess.run([*command, chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    worker.say("tests", ok=run.returncode == 0, rc=run.returncode, tail=run.stdout.strip()[-1500:])


CHECKS: dict[str, Callable[[Worker], None]] = {
    "search": search,
    "aoti": aoti,
    "bundle": bundle,
    "tests": tests,
}


def run_checks(worker: Worker, work: Sequence[str]) -> None:
    """Run checks by name, one after the other; `correct:llama,gpt2` names the families as well."""
    for each in work:
        name, _, families = each.partition(":")
        with worker.attempt(name):
            if name == "correct":
                correct(worker, families.split(","))
            else:
                CHECKS[name](worker)

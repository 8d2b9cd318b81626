"""One rule of execution: whatever runs a program computes what a plain loop over the HuggingFace
layers does, for a random program of nested damped repeats.

Shape legend: T tokens, V vocabulary, d hidden size.
"""

import functools
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polar_fx.backends import AotInductorBackend, ShapeClass
from polar_fx.backends.aot_inductor import GRAPH
from polar_fx.backends.specialize import graph_of
from polar_fx.backends.whole import WholePlan, WholeStep, compose
from polar_fx.compiled import CompiledModel, compile
from polar_fx.evaluation.block_influence import block_influences
from polar_fx.graph_files import export_onnx
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.library.symbols import Symbol
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion
from polar_fx.runtime.link import region_calls
from polar_fx.runtime.regions import RegionTable
from polar_fx.runtime.trunk import run_trunk, session_after
from tiny_models import make, make_slots, prompts, run_rows

DEPTH = 4
IDS = prompts(9)[0]


def _nested(seed: int) -> Program:
    """A damped repeat in a damped repeat; in every other program both end with the last step."""
    pick = random.Random(seed)
    inner, outer = (pick.choice((0.25, 0.5, 0.75)) for _ in range(2))
    layers = [pick.randrange(DEPTH) for _ in range(3)]
    block = f"({layers[0]} ({layers[1]} {layers[2]})*{pick.randint(2, 3)}@{inner})*2@{outer}"
    return Program.parse(f"0 {block}{' 3' if seed % 2 else ''}", DEPTH)


same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-4)
PROGRAMS = [_nested(seed) for seed in range(4)]
each_program = pytest.mark.parametrize("program", PROGRAMS, ids=str)


@functools.cache
def _model() -> PreTrainedModel:
    return make("llama")


@functools.cache
def _compiled() -> CompiledModel:
    return compile(_model(), "eager", max_length=15, cache=False)


# -------------------------------------------------------- the reference: none of our code runs here


@torch.no_grad()
def _states(path: tuple[int, ...], blends: list[tuple[int, int, float]]) -> list[Tensor]:
    """Hidden states [T, d] before the first step and after each, blends apart from steps: those of
    a block are computed by themselves, then mixed with what came in.
    """
    inner, tokens = _model().model, torch.arange(len(IDS))
    hidden = inner.embed_tokens(IDS[None])
    rotary = inner.rotary_emb(hidden, tokens[None])
    mask = torch.full((len(IDS), len(IDS)), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    found = [hidden]
    for number, layer in enumerate(path):
        out = inner.layers[layer](
            found[-1], attention_mask=mask, position_embeddings=rotary, position_ids=tokens[None]
        )
        out = out[0] if isinstance(out, tuple) else out
        ending = [blend for blend in blends if blend[1] == number + 1]
        for start, _, damping in sorted(ending, reverse=True):  # the inner one starts later
            out = (1 - damping) * found[start] + damping * out
        found.append(out)
    return [state[0] for state in found]


@functools.cache
def _wanted(program: Program) -> Tensor:
    """Logits [T, V]."""
    blends = [(b.start, b.stop, b.damping) for b in program.blends]
    with torch.no_grad():
        return _model().lm_head(_model().model.norm(_states(program.path, blends)[-1]))


# --------------------------------------------------------------------------------------- the users


@each_program
def test_the_programs_are_nested_and_damped(program: Program) -> None:
    assert len({b.damping for b in program.blends}) >= 1
    assert any(
        a.start <= b.start and b.stop <= a.stop and a != b
        for a in program.blends
        for b in program.blends
    )


@each_program
def test_the_interpreted_step_graph(program: Program) -> None:
    (got,) = run_rows(_compiled().library, program, rows=[IDS], prefill=[5])
    same(got, _wanted(program))


@each_program
def test_linked_regions(program: Program) -> None:
    """Every token; then a prefill, whose last step runs for one token, and a decode."""
    runner = _compiled().runner
    with torch.no_grad(), runner.open_slots(program, 1) as session:
        same(runner.prefill(session, [IDS], every=True)[0], _wanted(program))
    with torch.no_grad(), runner.open_slots(program, 1) as session:
        (last,) = runner.prefill(session, [IDS[:-1]])
        got = torch.stack([last, runner.decode(session, IDS[-1:])[0]])
    same(got, _wanted(program)[-2:])


@each_program
def test_steps_after_a_trunk(program: Program) -> None:
    runner = _compiled().runner
    with (
        run_trunk(runner, [IDS], num_steps=1) as trunk,
        session_after(runner, [program], trunk=trunk) as session,
    ):
        (got,) = runner.prefill(session, [IDS])
    same(got, _wanted(program)[-1])


@each_program
def test_a_row_on_blocks(program: Program) -> None:
    compiled = _compiled()
    same(compiled.forward(IDS[None], program=program)[0], _wanted(program))
    with torch.no_grad(), compiled.session(program, 1) as session:
        (last,) = compiled.prefill(program, session, [IDS[:-1]])
        got = torch.stack([last, compiled.decode(program, session, IDS[-1:])[0]])
    same(got, _wanted(program)[-2:])


def test_rows_in_lock_step() -> None:
    got = _compiled().forward(IDS.expand(len(PROGRAMS), -1), program=PROGRAMS)
    same(got, torch.stack([_wanted(p) for p in PROGRAMS]))


def _weights(program: Program) -> list[str]:
    """The distinct weights of a program."""
    table = _compiled().library.table
    calls = (table.prologue, *(table.layers[layer] for layer in program.path), table.epilogue)
    return list(dict.fromkeys(name for call in calls for name in call.weights))


def _plan(program: Program, shape: ShapeClass, *, folder: Path) -> WholePlan:
    """As `Tiers` plans it, the graphs of regions written into the folder."""
    library = _compiled().library
    table = RegionTable(library, AotInductorBackend(passes=()), max_length=15, store=None)
    numbers = {name: i for i, name in enumerate(_weights(program))}

    def step(symbol: Symbol, opens: int = 0, *, closes: tuple[float, ...] = ()) -> WholeStep:
        weights = tuple(numbers[name] for name in symbol.weights)
        return WholeStep(symbol.target, symbol.sides, weights, opens, closes)

    bodies = {}
    calls = region_calls(library.table, program, shape=shape, every=shape.tokens == 1)
    for number, name in enumerate(dict.fromkeys(calls)):
        (place := folder / str(number)).mkdir()
        source, _ = table._source(name)
        AotInductorBackend().export(*source, place)
        bodies[name] = str(place / GRAPH)
    layers = library.table.layers
    steps = tuple(step(layers[s.layer], s.opens, closes=s.closes) for s in program.schedule())
    start, head = step(library.table.prologue), step(library.table.epilogue)
    return WholePlan(shape, bodies, len(numbers), start, steps, head)


@pytest.mark.parametrize("program", PROGRAMS[:1], ids=str)
@pytest.mark.parametrize("prefill", [pytest.param(True, marks=pytest.mark.slow), False])
def test_whole_programs(program: Program, prefill: bool, tmp_path: Path) -> None:
    """The graph that a worker would compile, made of exported regions."""
    library = _compiled().library
    plan = _plan(program, ShapeClass(1, None if prefill else 1, 16), folder=tmp_path)
    plain = json.loads(json.dumps(plan.to_dict()))
    assert WholePlan.from_dict(plain).bodies == plan.bodies
    compose(AotInductorBackend(), plain, folder=tmp_path)
    whole = graph_of(torch.export.load(tmp_path / GRAPH))

    slots = make_slots(library, program, batch=1, length=16)
    given = [half for slot in slots for half in slot]
    given += [library.tensors[name] for name in _weights(program)]
    index, got = torch.arange(16), []
    with torch.no_grad():
        for start, ids in enumerate([IDS] if prefill else IDS.split(1)):
            where = [torch.tensor([len(IDS) - 1])] if prefill else []
            positions = torch.arange(start, start + len(ids))[None]
            got.append(whole(ids[None], positions, index, *where, *given)[0][0])
    want = _wanted(program)
    same(torch.cat(got), want[-1:] if prefill else want)


@each_program
def test_verdicts_by_teacher_forcing(program: Program) -> None:
    prefix, prompt, target = (tuple(part.tolist()) for part in IDS.split((3, 4, 2)))
    question = EncodedQuestion("q", prefix, prompt, (target,))
    (verdict,) = TeacherForcing(_compiled()).evaluate([(question, program)])
    likelihoods = _wanted(program)[6:8].log_softmax(-1)
    want = float(likelihoods[torch.arange(2), torch.tensor(target)].sum())
    assert verdict.log_likelihood == pytest.approx(want, abs=1e-3)


def test_block_influences() -> None:
    states = _states(tuple(range(DEPTH)), [])
    cosines = [
        torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).mean()
        for before, after in itertools.pairwise(states)
    ]
    got = block_influences(_compiled(), [IDS])
    np.testing.assert_allclose(got, 1 - np.array(cosines), atol=1e-5)


@pytest.mark.slow
def test_onnx_files(tmp_path: Path) -> None:
    for extra in ("onnx", "onnxscript"):
        pytest.importorskip(extra, reason="the extra `onnx` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    export_onnx(_compiled(), tmp_path / "files", programs=PROGRAMS[:2])
    for number, program in enumerate(PROGRAMS[:2]):
        (path,) = (tmp_path / "files").glob(f"*{number}*.onnx")
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        tokens = torch.arange(len(IDS))[None]
        given = {"input_ids": IDS[None], "positions": tokens, "logits_at": tokens}
        slots = make_slots(_compiled().library, program, batch=1, length=16)
        names = [i.name for i in session.get_inputs()][3:]
        given |= dict(zip(names, [t for pair in slots for t in pair], strict=True))
        logits, *_ = session.run(None, {name: t.numpy() for name, t in given.items()})
        same(torch.from_numpy(logits)[0], _wanted(program))

"""Bundles: they answer as the compiled model does, in a process that has no modeling code and no
compiler.

Shape legend: B batch, T tokens, V vocabulary.
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from places import ROOT
from polar_fx.bundle import (
    BundledModel,
    BundleError,
    Manifest,
    export,
    load_bundle,
)
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, KvOverflowError, ProgramError
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu
from polar_fx.predictor.policy import Calibration
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.program import Program
from polar_fx.quantized import quantize_weights
from polar_fx.store import ArtifactStore
from portable_regions import use_graphs
from slow_cases import some_slow
from tiny_bundles import DEPTH, LENGTH, PROGRAMS, compiled_model, tokenizer_of_words
from tiny_models import make, prompts


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compiled_model()


@pytest.fixture(scope="module")
def folder(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundles") / "bundle"
    compiled.generation_config.max_new_tokens = 6
    export(compiled, place, PROGRAMS, tokenizer=tokenizer_of_words())
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> BundledModel:
    return load_bundle(folder, any_program=True)


@torch.no_grad()
def _answer(model: CompiledModel, program: Any, *, tokens: int = 9) -> Tensor:
    """[T + 2, V]: logits of every token of a prompt, of its last one by prefill, and of one decoded
    token.
    """
    chosen, (row,) = model.resolve(program), prompts(tokens)
    with model.session(chosen, 1) as session:
        last = model.prefill(chosen, session, [row])[0]
        then = model.decode(chosen, session, torch.tensor([5]))[0]
    return torch.cat([model.forward(row[None], program=chosen)[0], last[None], then[None]])


def _random_program(pick: random.Random) -> Program:
    program = Program.from_path([pick.randrange(DEPTH) for _ in range(pick.randint(1, 7))], DEPTH)
    if pick.random() < 0.5:
        start = pick.randrange(program.num_steps)
        number = pick.randint(1, program.num_steps - start)
        path = program.path[start : start + number]
        text = f"({' '.join(map(str, path))})*{pick.randint(2, 3)}@{pick.choice((0.25, 0.5, 1.0))}"
        around = [
            " ".join(map(str, p)) for p in (program.path[:start], program.path[start + number :])
        ]
        program = Program.parse(f"{around[0]} {text} {around[1]} /{DEPTH}", DEPTH)
    return program


def test_logits_are_those_of_the_compiled_model(
    compiled: CompiledModel, bundle: BundledModel
) -> None:
    pick = random.Random(0)
    programs = list(
        dict.fromkeys([Program.identity(DEPTH), *(_random_program(pick) for _ in range(70))])
    )[:51]
    assert len(programs) == 51
    assert any(p.blends for p in programs)
    assert any(p.num_steps > DEPTH for p in programs)
    for program in programs:
        tokens = pick.randint(1, 20)
        torch.testing.assert_close(
            _answer(bundle, program, tokens=tokens),
            _answer(compiled, program, tokens=tokens),
            rtol=0,
            atol=1e-5,
        )
    assert bundle.compilations == () and not bundle.library.is_traced
    assert [r.source for r in bundle.regions.records] == ["loaded"] * 7


def test_generation_is_that_of_the_compiled_model(
    compiled: CompiledModel, bundle: BundledModel
) -> None:
    ids = torch.stack(prompts(9, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for arguments in (
        {},
        {"num_beams": 2},
        {"attention_mask": mask},
        {"max_new_tokens": 3, "eos_token_id": 7},
    ):
        for program in PROGRAMS:
            given: dict[str, Any] = {"program": program, "do_sample": False, **arguments}
            mine, theirs = (
                bundle.generate(ids, **given),
                torch.cat(_row_by_row(compiled, ids, given=given)),
            )
            assert torch.equal(mine, theirs), arguments
    assert bundle.generate(ids[:1]).shape == (1, 15), "the exported default of max_new_tokens"
    with pytest.raises(KvOverflowError, match=r"exceed the KV pool of 63"):
        bundle.generate(ids, max_new_tokens=60)


def _row_by_row(compiled: CompiledModel, ids: Tensor, *, given: dict[str, Any]) -> list[Tensor]:
    """As the bundle does it, for the compiled model has no regions for many rows yet; padded to
    equal lengths.
    """
    compiled.runner.deterministic = True
    try:
        return [compiled.generate(ids, **given)]
    finally:
        compiled.runner.deterministic = False


def test_warmup_report_and_explain_know_what_is_there(bundle: BundledModel) -> None:
    assert bundle.warmup(PROGRAMS, batch=3) == ()
    assert bundle.report().totals["num_loaded"] == 7 and "7 loaded" in bundle.report().text()
    explained = bundle.explain("skip 1")
    assert explained.missing == () and not explained.would_trace
    assert "3 programs" in repr(bundle) and bundle.depth == DEPTH and bundle.dtype == torch.float32


def test_the_tokenizer_is_shipped_along(
    bundle: BundledModel, compiled: CompiledModel, tmp_path: Path
) -> None:
    assert (
        bundle.tokenizer("w5 w17").input_ids == [5, 17]
        and bundle.tokenizer.decode([5, 17]) == "w5 w17"
    )
    export(compiled, tmp_path / "bundle")
    without = load_bundle(tmp_path / "bundle")
    assert without.programs == (Program.identity(DEPTH),)
    with pytest.raises(InputError, match="holds no tokenizer; export it with tokenizer="):
        _ = without.tokenizer


IN_ANOTHER_PROCESS = """
import json, re, sys
import torch
from polar_fx.bundle import load_bundle
from polar_fx.runtime.code_key import target_of
from safetensors.torch import load_file, save_file

folder, inputs, results = sys.argv[1:]
torch.set_num_threads(int(inputs.partition(":")[0]))
given = load_file(inputs.partition(":")[2])
target_of(torch.device("cpu"))  # Python's own platform module asks uname
events = []
WATCHED = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.posix_spawn",
    "os.exec",
    "os.system",
    "os.fork",
)
sys.addaudithook(lambda event, args: events.append(event) if event in WATCHED else None)
bundle = load_bundle(folder)
save_file({str(p): bundle.forward(given["ids"], program=p) for p in bundle.programs}, results)
tokens = bundle.generate(given["ids"], do_sample=False).tolist()
family = [m for m in sys.modules if re.match(r"transformers\\.models\\.(?!auto\\b)\\w+", m)]
words = bundle.tokenizer.decode(tokens[0])  # transformers imports some configurations for this
modeling = family + [
    m for m in sys.modules if re.match(r"transformers\\.models\\.(?!auto\\.)\\w+\\.modeling_", m)
]
models = [
    c.__name__
    for c in torch.nn.Module.__subclasses__()
    if c.__module__.startswith("transformers.models.")
]
compiled = (
    [r.source for r in bundle.regions.records],
    len(bundle.compilations),
    bundle.library.is_traced,
)
print(json.dumps([tokens, words, modeling, models, compiled, events]))
"""


def test_a_fresh_process_needs_no_modeling_code_and_no_compiler(
    compiled: CompiledModel, folder: Path, tmp_path: Path
) -> None:
    """There is no program to be found on its PATH, nothing is unpickled, and no file of a model's
    family is imported.
    """
    ids = torch.stack(prompts(9))
    save_file({"ids": ids}, tmp_path / "in.safetensors")
    given = f"{torch.get_num_threads()}:{tmp_path / 'in.safetensors'}"
    other = subprocess.run(
        [
            sys.executable,
            "-c",
            IN_ANOTHER_PROCESS,
            str(folder),
            given,
            str(tmp_path / "out.safetensors"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "",
            "POLAR_FX_CACHE_DIR": str(tmp_path / "cache"),
        },
    )
    assert other.returncode == 0, other.stderr
    tokens, text, modeling, models, regions, events = json.loads(other.stdout.splitlines()[-1])
    assert (modeling, models, events) == ([], [], [])
    assert regions == [["loaded"] * 7, 0, False] and not (tmp_path / "cache").exists()
    assert tokens == compiled.generate(
        ids, do_sample=False
    ).tolist() and text == tokenizer_of_words().decode(tokens[0])
    logits = load_file(tmp_path / "out.safetensors")
    assert len(logits) == len(PROGRAMS)
    for program in PROGRAMS:
        want = compiled.forward(ids, program=program)
        torch.testing.assert_close(logits[str(compiled.resolve(program))], want, rtol=0, atol=1e-5)


def test_only_the_programs_of_the_manifest_run_unless_asked(
    folder: Path, bundle: BundledModel
) -> None:
    strict = load_bundle(folder)
    (row,) = prompts(5)
    assert strict.default_program == Program.identity(DEPTH)
    for program in (*PROGRAMS, None, [0, 1, 2, 3]):
        strict.forward(row[None], program=program)
    for program in ("skip 2", [3, 2, 1]):
        bundle.forward(row[None], program=program)
        with pytest.raises(
            ProgramError, match=r"is not among the 3 programs of the bundle .* any_program=True"
        ):
            strict.forward(row[None], program=program)
    with pytest.raises(ProgramError, match="has depth 5 but the model has 4 layers"):
        bundle.forward(row[None], program=Program.identity(5))


def test_inputs_are_dispatched_to_programs_of_the_bundle(
    folder: Path, compiled: CompiledModel
) -> None:
    strict, ids = load_bundle(folder), torch.stack(prompts(9, 9))
    assert (
        strict.library.model_fingerprint
        == strict.manifest.weights
        == compiled.library.model_fingerprint
    )
    strict.dispatch_by(menu=PROGRAMS, policy="skip 1")
    assert strict.warmup() == ()
    got, report = strict.dispatch(ids, do_sample=False)
    assert torch.equal(got, strict.generate(ids, program="skip 1", do_sample=False))
    assert {str(d.program) for d in report.decisions} == {"0 2-3 /4"}
    dispatcher = strict.dispatcher
    for error, given in (
        (ProgramError, {"policy": "skip 2"}),
        (InputError, {"policy": "identity", "unprepared": "link"}),
    ):
        with pytest.raises(error, match="any_program=True"):
            strict.dispatch_by(**given)  # type: ignore[arg-type]
    assert strict.dispatcher is dispatcher


def _size(place: Path) -> int:
    return sum(p.stat().st_size for p in place.rglob("*") if p.is_file())


def test_many_programs_cost_what_one_does(compiled: CompiledModel, tmp_path: Path) -> None:
    pick = random.Random(1)
    programs = list(dict.fromkeys(_random_program(pick) for _ in range(100)))[:64]
    one, many = (export(compiled, tmp_path / str(len(p)), p) for p in (programs[:1], programs))
    assert len(many.programs) == 64 and many.num_bytes == one.num_bytes
    assert _size(tmp_path / "64") <= 1.02 * _size(tmp_path / "1")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ArtifactStore:
    """Regions are exported graphs, so that no compiler runs; in a store of their own."""
    use_graphs(monkeypatch, tmp_path / "cache")
    return ArtifactStore(tmp_path / "artifacts", limit_bytes=0)


def _bundled(
    model: PreTrainedModel, store: ArtifactStore | bool, *, place: Path, **options: Any
) -> tuple[CompiledModel, Manifest]:
    compiled = compile(
        model,
        "aot_inductor",
        max_length=LENGTH,
        cache=store,
        workers=0,
        deterministic=options.pop("exact", False),
    )
    return compiled, export(compiled, place, ["skip 1"], **options)


def test_weights_as_integers_are_shipped_at_their_own_size(
    tmp_path: Path, graphs: ArtifactStore
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": True}
    model = quantize_weights(make("llama", **sizes), "int4")
    compiled, manifest = _bundled(model, graphs, place=tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    got, want = _answer(bundle, "skip 1"), _answer(compiled, "skip 1")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    (weights,) = (f.num_bytes for f in manifest.files if f.path.endswith(".safetensors"))
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held < weights < 1.5 * held and manifest.dtype == "float32"


def _check(compiled: CompiledModel, bundle: CompiledModel, *, rows: Sequence[int]) -> None:
    ids = torch.nn.utils.rnn.pad_sequence(prompts(*rows), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(n, dtype=torch.long) for n in rows], batch_first=True
    )
    for program in ("skip 1", "(0-1)*2@0.5 2"):
        want = compiled.forward(ids, mask, program=program)
        torch.testing.assert_close(
            bundle.forward(ids, mask, program=program), want, rtol=0, atol=1e-5
        )
    assert bundle.compilations == () and not bundle.library.is_traced


@pytest.mark.slow
def test_a_bundle_for_many_rows_runs_them_at_once(graphs: ArtifactStore, tmp_path: Path) -> None:
    compiled, manifest = _bundled(
        make("qwen2_moe", decoder_sparse_step=2), graphs, place=tmp_path / "bundle", buckets=(1, 4)
    )
    assert manifest.many_rows and len([f for f in manifest.files if f.region]) == 2 * (3 * 2 + 4), (
        "two kinds of layers"
    )
    bundle = load_bundle(tmp_path / "bundle", any_program=True)
    assert not bundle.deterministic
    _check(compiled, bundle, rows=(9, 3, 5))
    _check(compiled, bundle, rows=(4,))
    ids = torch.stack(prompts(6, 6, 6))
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        bundle.generate(ids, **given), compiled.generate(ids, **given, program="skip 1")
    )


@pytest.mark.parametrize("family", some_slow(["gpt2", "gemma3_text"], ["gpt2"]))
def test_other_families_and_exact_rows(family: str, graphs: ArtifactStore, tmp_path: Path) -> None:
    compiled, manifest = _bundled(
        make(family), graphs, place=tmp_path / "bundle", buckets=(1, 4), exact=True
    )
    assert manifest.deterministic and not manifest.many_rows, (
        "rows are run one by one: regions for many would never run"
    )
    bundle = load_bundle(tmp_path / "bundle", any_program=True)
    _check(compiled, bundle, rows=(9, 3))
    ids = torch.stack(prompts(6, 6))
    given: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    assert torch.equal(
        bundle.generate(ids, **given), compiled.generate(ids, **given, program="skip 1")
    )


@pytest.mark.slow
def test_without_a_store_and_with_one_that_has_no_room_regions_are_made_for_the_bundle(
    graphs: ArtifactStore, tmp_path: Path
) -> None:
    for number, store in enumerate((False, ArtifactStore(tmp_path / "small", limit_bytes=1))):
        _, manifest = _bundled(make("llama"), store, place=tmp_path / f"bundle{number}")
        assert len([f for f in manifest.files if f.region]) == 7
        load_bundle(tmp_path / f"bundle{number}")


@pytest.mark.usefixtures("graphs")
def test_a_selector_is_shipped_with_its_menu_and_policy(tmp_path: Path) -> None:
    model = compiled_model()
    menu = Menu.of([Program.parse(text, DEPTH) for text in ("skip 2", "repeat 3")])
    network = SelectorNetwork(2 * model.config.hidden_size, len(menu), width=4)
    selector = Selector(
        menu, Features(1, 8), network=network, calibration=Calibration(0.0, {0.9: 0.1})
    )
    model.dispatch_by(selector, policy="mean_steps<=0.9").admit()
    with pytest.raises(InputError, match="which is not among programs="):
        export(model, tmp_path / "a", ["identity"])
    manifest = export(model, tmp_path / "b", buckets=(1, 2))
    assert manifest.programs == menu.programs
    loaded = load_bundle(tmp_path / "b")
    ids = torch.arange(12).reshape(3, 4)
    options: dict[str, Any] = dict(
        max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    (wanted, report), (got, again) = model.dispatch(ids, **options), loaded.dispatch(ids, **options)
    assert torch.equal(got, wanted)
    for mine, theirs in zip(again.decisions, report.decisions, strict=True):
        assert mine.program == theirs.program
    assert loaded.dispatcher is not None and str(loaded.dispatcher.policy) == "mean_steps<=0.9"
    loaded.choose_by("steps<=0.6")  # a budget that none on the menu keeps
    assert {d.num_steps for d in loaded.dispatch(ids, **options)[1].decisions} == {DEPTH}
    assert str(loaded.choose_by("skip 2").policy) == "0-1 3 /4"
    assert {d.num_steps for d in loaded.dispatch(ids, **options)[1].decisions} == {DEPTH - 1}
    with pytest.raises(ProgramError, match="is not among the 3 programs"):
        loaded.choose_by("skip 3")
    (tmp_path / "b" / "predictor" / "predictor.json").write_text("{}")
    with pytest.raises(BundleError, match=r"predictor\.json"):
        load_bundle(tmp_path / "b")

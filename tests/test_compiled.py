"""CompiledModel: what is compiled and when, what is shared, and what bad input gets."""

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from polar_fx.backends import EagerBackend, InductorBackend, ShapeClass
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import (
    InputError,
    KvOverflowError,
    ModelWarning,
    PolarError,
    ProgramError,
    ProgramTextError,
    UnknownBackendError,
    UnsupportedModelError,
)
from polar_fx.program import Program
from tiny_bundles import tokenizer_of_words
from tiny_models import make, prompts


@functools.cache
def _eager() -> CompiledModel:
    return compile(make("llama"), "eager", max_length=31, prefill_chunk=8)


# ------------------------------------------------------------------------------------- compilations


class _Counting(InductorBackend):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def compile_region(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().compile_region(*args, **kwargs)


class _CountingInterpreter(EagerBackend):
    """Wants a region for each class of shapes, as compilers do."""

    name = "counting"
    needs_shapes = True
    calls = 0

    def compile_region(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().compile_region(*args, **kwargs)


@pytest.fixture(scope="module")
def counted() -> tuple[CompiledModel, _Counting]:
    backend = _Counting()
    return compile(make("llama", num_hidden_layers=8), backend, max_length=63), backend


def test_layers_compile_once_and_further_programs_not_at_all(
    counted: tuple[CompiledModel, _Counting],
) -> None:
    compiled, backend = counted
    ids = prompts(20)[0][None]
    compiled.generate(ids, max_new_tokens=4, do_sample=False)
    first = backend.calls
    # prologue and one kind of layer, for prefill and decode; the head sees one token a row in both
    assert first == len(compiled.compilations) == 6
    pick = random.Random(0)
    for _ in range(50):
        program = Program.from_path(tuple(pick.randrange(8) for _ in range(pick.randint(1, 16))), 8)
        compiled.generate(
            ids[:, : pick.randint(2, 20)], program=program, max_new_tokens=3, do_sample=False
        )
    assert backend.calls == first, "another program or prompt length compiled something"


def test_token_ids_may_be_of_32_bits(counted: tuple[CompiledModel, _Counting]) -> None:
    ids = prompts(9)[0][None]
    assert torch.equal(counted[0].forward(ids.int()), counted[0].forward(ids))


def test_results_carry_no_gradient() -> None:
    assert not _eager().forward(prompts(5)[0][None]).requires_grad
    with _eager().session(_eager().default_program, 1) as session:
        assert not _eager().prefill(_eager().default_program, session, prompts(5))[0].requires_grad


def test_any_batch_size_from_two_up_is_one_class(counted: tuple[CompiledModel, _Counting]) -> None:
    compiled, backend = counted
    compiled.generate(torch.stack(prompts(9, 9)), max_new_tokens=3, do_sample=False)
    before = backend.calls
    for batch in (3, 5):
        compiled.generate(
            torch.stack(prompts(*[11] * batch)), program="skip 3", max_new_tokens=3, do_sample=False
        )
    assert backend.calls == before


def test_warmup_compiles_all_that_a_call_needs() -> None:
    backend = _CountingInterpreter()
    compiled = compile(make("gemma2"), backend, max_length=31)
    assert len(compiled.warmup(["identity", "skip 2"])) == backend.calls == 6
    compiled.generate(prompts(9)[0][None], program="skip 0", max_new_tokens=3, do_sample=False)
    compiled.generate(prompts(9)[0][None], max_new_tokens=3, do_sample=False)
    assert backend.calls == 6
    assert compiled.warmup() == ()


# ------------------------------------------------------------------------------------------ sharing


def test_no_weight_is_copied() -> None:
    model = make("llama")
    compiled = compile(model, "eager", max_length=31)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    calls = (compiled.library.prologue, *compiled.library.layers, compiled.library.epilogue)
    used = {w.untyped_storage().data_ptr() for call in calls for w in call.weights if w.dim() > 1}
    assert used and used <= own
    with torch.no_grad():
        before = compiled.forward(prompts(5)[0][None])
        model.lm_head.weight.mul_(2)
    assert torch.allclose(compiled.forward(prompts(5)[0][None]), 2 * before), (
        "the user's weights are the weights"
    )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"
)
@pytest.mark.slow
def test_fifty_programs_add_less_than_two_percent_to_the_weights(
    smollm2: tuple[PreTrainedModel, Any],
) -> None:
    model, _ = smollm2
    compiled = compile(model, "eager", max_length=63)
    ids = torch.full((1, 8), 5)
    longest = Program.identity(30).repeat(0, 30, 2)
    # allocates the slots of 60 steps
    compiled.generate(ids, program=longest, max_new_tokens=2, do_sample=False)
    before = _resident_bytes()
    pick = random.Random(0)
    for _ in range(50):
        path = tuple(pick.randrange(30) for _ in range(pick.randint(1, 12)))
        compiled.generate(
            ids, program=Program.from_path(path, 30), max_new_tokens=2, do_sample=False
        )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert _resident_bytes() - before < 0.02 * weights


def test_slots_return_to_the_pool_and_are_reused() -> None:
    compiled = compile(make("llama"), "eager", max_length=31)
    ids = prompts(5)[0][None]
    compiled.forward(ids)
    held = compiled.pool.num_bytes
    for program in ("skip 1", "identity", "3 2 1 0"):
        compiled.forward(ids, program=program)
    assert compiled.pool.num_bytes == held
    with (
        pytest.raises(RuntimeError, match="stop here"),
        compiled.session(compiled.default_program, 1),
    ):
        raise RuntimeError("stop here")
    compiled.forward(ids)
    assert compiled.pool.num_bytes == held, "a failed call must give its slots back"


@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_of_one_call_does_not_reach_the_next(deterministic: bool) -> None:
    """A program may overflow; masked columns are multiplied by zero, and 0 * NaN is NaN."""
    compiled = compile(make("llama"), "eager", max_length=31, deterministic=deterministic)
    ids = prompts(12, 12)
    want = compiled.forward(ids[0][None, :3])
    slots, program = (
        compiled.runner.open_slots(compiled.default_program, 2),
        compiled.default_program,
    )
    with torch.no_grad(), slots as session:
        compiled.prefill(program, session, [ids[0], ids[1][:5]])
        for row, length in enumerate(session.lengths):
            for keys, values in session.slots:
                keys[row, :, :length] = values[row, :, :length] = float("nan")
    with torch.no_grad(), compiled.runner.open_slots(program, 1) as session:
        torch.testing.assert_close(compiled.prefill(program, session, [ids[0][:3]])[0], want[0, -1])
    with torch.no_grad(), compiled.session(program, 2) as session:
        compiled.prefill(program, session, [ids[0], ids[1][:5]])
        for spec in set(compiled.library.table.kv_specs):
            for tensor in compiled.runner.lockstep.store.tensors(spec):
                tensor[1:] = float("nan")  # all but the block that no row holds
    assert torch.equal(compiled.forward(ids[0][None, :3]), want)


def test_linked_programs_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_fx.runtime.link._MAX_LINKED", 3)
    compiled = compile(make("llama"), "eager", max_length=31)
    for layer in (0, 1, 2, 3, 0):
        with compiled.runner.open_slots(compiled.resolve([layer]), 1) as session:
            compiled.runner.prefill(session, prompts(3), every=True)
    assert len(compiled.linker.programs) == 3


def test_what_another_thread_linked_meanwhile_is_not_linked_again() -> None:
    compiled = compile(make("llama"), "eager", max_length=31)
    linker, shape = compiled.linker, ShapeClass.of(1, 1, compiled.pool.length)
    lock, theirs = linker._lock, []

    class Late:
        """The lock, which another thread holds until it has linked the program."""

        def __enter__(self) -> None:
            linker._lock = lock
            theirs.append(linker.link(compiled.default_program, shape))

        def __exit__(self, *error: object) -> None: ...

    linker._lock = Late()  # type: ignore[assignment]
    assert linker.link(compiled.default_program, shape) is theirs[0]


def test_what_an_earlier_call_left_in_the_slots_does_not_matter() -> None:
    compiled = compile(make("llama"), "eager", max_length=31)
    ids = prompts(9)[0][None]
    want = compiled.forward(ids)
    compiled.forward(prompts(31)[0][None], program="3 3 3 3")
    compiled.forward(torch.stack(prompts(30, 30)))
    assert torch.equal(compiled.forward(ids), want)


# ---------------------------------------------------------------------------------------- bad input


def test_a_program_of_another_depth() -> None:
    with pytest.raises(ProgramError, match=r"depth 8 but the model has 4 layers.*/4"):
        _eager().forward(prompts(5)[0][None], program=Program.identity(8))


def test_malformed_program_text_points_at_the_place() -> None:
    with pytest.raises(ProgramTextError, match="column"):
        _eager().forward(prompts(5)[0][None], program="0-1 ?? 2")


def test_a_layer_out_of_range() -> None:
    with pytest.raises(ProgramError, match="9"):
        _eager().forward(prompts(5)[0][None], program=[0, 9])


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(UnknownBackendError, match=r"'cuda-graphs'.*eager.*inductor"):
        compile(make("llama"), "cuda-graphs")


BAD_IDS: dict[str, tuple[Any, str]] = {
    "no row": (torch.zeros(0, 5, dtype=torch.long), "empty"),
    "no token": (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
    "float ids": (torch.zeros(1, 5), "torch.float32.*tokenizer"),
    "bool ids": (torch.zeros(1, 5, dtype=torch.bool), "torch.bool"),
    "one axis": (
        torch.zeros(5, dtype=torch.long),
        r"\[batch, tokens\], got a tensor of shape \(5,\)",
    ),
    "a list": ([[1, 2]], "got list"),
    "text": ("what is 2 + 2?", "got str"),
    "an id beyond the vocabulary": (
        torch.tensor([[1, 100]]),
        "token id 100, outside the vocabulary 0..99",
    ),
    "a negative id": (torch.tensor([[-100, 1]]), "token id -100"),
}


@pytest.mark.parametrize("ids,message", BAD_IDS.values(), ids=BAD_IDS)
def test_bad_token_ids(ids: Any, message: str) -> None:
    for call in (_eager().forward, _eager().generate):
        with pytest.raises(InputError, match=message):
            call(ids)


def test_bad_masks() -> None:
    ids = prompts(5)[0][None]
    with pytest.raises(InputError, match=r"of the shape of input_ids \(1, 5\), got \(1, 4\)"):
        _eager().forward(ids, torch.ones(1, 4))
    with pytest.raises(InputError, match="got list"):
        _eager().forward(ids, [[1] * 5])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="row 0 has no token"):
        _eager().forward(ids, torch.zeros(1, 5))


def test_a_prompt_longer_than_the_pool_writes_nothing() -> None:
    compiled = _eager()
    with torch.no_grad(), compiled.runner.open_slots(compiled.default_program, 2) as session:
        compiled.prefill(compiled.default_program, session, prompts(20, 6))
        before = [(k.clone(), v.clone()) for k, v in session.slots]
        # the first chunk of the second row would still fit: the whole call must be refused before
        # it
        with pytest.raises(
            KvOverflowError,
            match=r"row 1 needs 36 token positions but the KV pool holds 31.*max_length=36",
        ):
            compiled.prefill(compiled.default_program, session, prompts(2, 30))
        assert session.lengths == [20, 6]
        assert all(
            torch.equal(a, b)
            for old, new in zip(before, session.slots, strict=True)
            for a, b in zip(old, new, strict=True)
        )


def test_decode_beyond_the_pool() -> None:
    compiled = _eager()
    with torch.no_grad(), compiled.session(compiled.default_program, 1) as session:
        compiled.prefill(compiled.default_program, session, prompts(31))
        with pytest.raises(KvOverflowError, match="row 0 needs 32"):
            compiled.decode(compiled.default_program, session, torch.tensor([5]))


@pytest.mark.parametrize(
    "name,value",
    [
        ("max_length", 0),
        ("max_length", 1.5),
        ("max_length", 10**6),
        ("prefill_chunk", -1),
        ("prefill_chunk", True),
    ],
)
def test_bad_options(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}.*{value}"):
        compile(make("llama"), "eager", **{name: value})


def test_a_model_without_a_layer_stack() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear.*polar_fx.load"):
        compile(torch.nn.Linear(2, 2), "eager")  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_warned_about() -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.warns(ModelWarning, match=r"layers.2.mlp.up_proj.weight"):
        compile(model, "eager", max_length=31)


def test_it_is_called_as_models_of_transformers_are() -> None:
    compiled, ids = _eager(), prompts(5)[0][None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = compiled(**given, program="skip 1").logits
    assert logits is not None and torch.equal(logits, compiled.forward(ids, program="skip 1"))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    want = compiled.generate(ids, **options)
    assert torch.equal(compiled.generate(inputs=ids, **options), want)
    assert torch.equal(compiled.generate(**given, **options), want)
    with pytest.raises(InputError, match="input_ids must be"):
        compiled.generate(**options)


def test_it_is_a_model_for_a_pipeline() -> None:
    tokenizer, model = tokenizer_of_words(), _eager()
    tokenizer.pad_token = "w0"
    pipe: Any = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)  # type: ignore[call-overload]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "program": "skip 1"}
    (answer,) = pipe("w5 w6 w7", **options, return_full_text=False)
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    want = tokenizer.decode(model.generate(ids, **options)[0, 3:])
    assert answer["generated_text"].split() == want.split()


@pytest.mark.parametrize("program", [5, 0.5, object()])
def test_what_is_no_program(program: Any) -> None:
    with pytest.raises(ProgramError, match=r"give the numbers of layers, or a text"):
        _eager().resolve(program)


def test_every_error_can_be_caught_as_one() -> None:
    with pytest.raises(PolarError):
        _eager().forward(torch.zeros(1, 0, dtype=torch.long))

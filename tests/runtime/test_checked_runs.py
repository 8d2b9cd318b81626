"""`check=True` sees what users run: slots and their spare column, ragged rows, parts, the last
step, decoding past what changes with the length, and parts of other dtypes.
"""

from typing import Any

import pytest
import torch

from plain_loop import plain_logits
from polar_fx.capture.checked import capture_checked
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import CaptureError
from polar_fx.library import LayerLibrary
from polar_fx.program import Program
from polar_fx.runtime import checked_runs
from polar_fx.runtime.kv_cache import KvSession
from polar_fx.runtime.link import LinkedProgram
from polar_fx.runtime.runner import Runner
from polar_fx.store import ArtifactStore
from slow_cases import some_slow
from tiny_models import WINDOW, make, prompts, reference

LENGTH = 31
REFUSED = r"LlamaForCausalLM is not supported: in {} of rows of .* tokens, logits differ"


def _compile(family: str = "llama", **options: Any) -> CompiledModel:
    model = make(family, num_hidden_layers=options.pop("layers", 2), **options)
    return compile(model, "eager", max_length=LENGTH, cache=False)


@pytest.mark.parametrize(
    "family", some_slow(("gpt2", "bloom", "gemma2", "deepseek_v3"), ("bloom", "gemma2"))
)
def test_models_pass(family: str) -> None:
    _compile(family, layers=4)


@pytest.mark.parametrize("max_length", [1, 2, 15, 16, 17])
def test_slots_of_any_length_pass(max_length: int) -> None:
    for family in ("llama", "gpt2"):
        model = make(family, num_hidden_layers=2)
        assert compile(model, "eager", max_length=max_length, cache=False).pool.length % 16 == 0


def test_the_position_limit_passes() -> None:
    """The spare column lies beyond a table of positions."""
    model = make("opt", max_position_embeddings=32, num_hidden_layers=2)
    assert compile(model, "eager", cache=False).pool.max_length == 32


@pytest.mark.parametrize("what", ["spare column", "position of a part", "last step", "decoding"])
def test_faults_of_running_are_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "spare column":  # padding lands on a real token's column
        plain = KvSession.positions

        def positions(self: Any, counts: Any, tokens: Any = None) -> Any:
            found = plain(self, counts, tokens)
            return torch.where(found == self.pool.length - 1, 0, found)

        monkeypatch.setattr(KvSession, "positions", positions)
    elif what == "position of a part":
        plain_advance = KvSession.advance

        def advance(self: Any, counts: Any) -> None:
            plain_advance(self, [n - (n > 1) for n in counts])

        monkeypatch.setattr(KvSession, "advance", advance)
    elif what == "last step":
        monkeypatch.setattr(LinkedProgram, "write_kv", lambda self, inputs: None)
    else:
        plain_decode = Runner.decode
        monkeypatch.setattr(Runner, "decode", lambda *a: plain_decode(*a).flip(0))
    with pytest.raises(CaptureError, match=REFUSED.format("(decoding|prefill)")):
        _compile()


def test_a_window_that_a_graph_does_not_hold_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing shows before as many tokens as the window has; the rows are longer."""
    model = make("mistral", num_hidden_layers=2)
    rows = checked_runs._rows(model, LENGTH)
    assert [len(r) for r in rows] == [12, 10] and WINDOW + 3 <= 12
    wide = make("mistral", num_hidden_layers=2, sliding_window=20)
    assert [len(r) for r in checked_runs._rows(wide, LENGTH)] == [23, 21]
    plain = checked_runs.shared_view

    def narrow(*args: Any) -> Any:
        view = plain(*args)
        view.config.sliding_window = 18
        return view

    monkeypatch.setattr(checked_runs, "shared_view", narrow)
    with pytest.raises(CaptureError, match="of rows of 23 and 21 tokens"):
        compile(wide, "eager", max_length=LENGTH, cache=False)


@pytest.mark.parametrize("change", ["a window", "other frequencies"])
def test_what_changes_late_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random keys and values stand for a long prompt."""
    late = 300
    if change == "a window":
        model = make(
            "mistral", num_hidden_layers=2, max_position_embeddings=512, sliding_window=late
        )
    else:
        rope = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": late,
        }
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        model = make(
            "llama",
            num_hidden_layers=2,
            max_position_embeddings=512,
            rope_parameters={**rope, **factors},
        )
    library = LayerLibrary(capture_checked(model))
    checked_runs.check_runs(model, library, max_length=320)
    plain = checked_runs.shared_view

    def other(*args: Any) -> Any:
        view = plain(*args)
        if change == "a window":
            view.config.sliding_window = late + 1
        else:
            view.config.rope_parameters["long_factor"] = [5.0] * 4
        return view

    monkeypatch.setattr(checked_runs, "shared_view", other)
    with pytest.raises(CaptureError, match=r"in 5 tokens after (299|301), logits differ"):
        checked_runs.check_runs(model, library, max_length=320)
    checked_runs.check_runs(model, library, max_length=302)  # no row comes so far


def test_what_failed_is_not_found_on_disk_later(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = make("llama", num_hidden_layers=2), ArtifactStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LinkedProgram, "write_kv", lambda self, inputs: None)
        for _ in range(2):
            with pytest.raises(CaptureError, match=REFUSED.format("decoding")):
                compile(model, "eager", max_length=LENGTH, cache=store)
    for traced in (True, False):
        again = compile(model, "eager", max_length=LENGTH, cache=store)
        assert again.library.is_traced is traced


@pytest.mark.parametrize(
    "parts",
    ["lm_head", "model.norm", "model.layers.0.mlp"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_may_have_another_dtype(parts: str, dtype: torch.dtype) -> None:
    """The tolerance is that of the coarsest part, wherever it stands."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    model, ids = make("llama", num_hidden_layers=2).to(dtype), prompts(9)[0]
    model.get_submodule(parts).to(other)
    for module in model.modules():  # a plain linear layer takes its own dtype only
        if isinstance(module, torch.nn.Linear):
            module.forward = _casting(module).__get__(module)
    compiled = compile(model, "eager", max_length=LENGTH, cache=False)
    want = reference(model, [ids])[0]
    got = compiled.forward(ids[None])[0]
    assert float((got - want).abs().max()) <= 0.1 * float(want.abs().max())
    # layers called in another order take a hidden state of the dtype that they know
    programs = ["1", "0 1 (0)*2@0.5"]
    both = compiled.forward(torch.stack((ids, ids)), program=programs)
    for own, text in zip(both, programs, strict=True):
        want = plain_logits(model, Program.parse(text, 2), row=ids)
        assert float((own - want).abs().max()) <= 0.1 * float(want.abs().max())


def _casting(module: torch.nn.Linear) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight)

    return forward


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_unused_tokens_nan_reaches_no_row(family: str) -> None:
    """Padding is made of a row's own tokens: what token 0 holds does not matter to others."""
    model, rows = make(family, num_hidden_layers=2, tie_word_embeddings=False), prompts(9, 5)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.nan
    with pytest.warns(UserWarning, match="NaN"):
        compiled = compile(model, "eager", max_length=LENGTH, prefill_chunk=4, cache=False)
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, 1
    for program in ("identity", ["identity", "0 1 1"]):
        got = compiled.forward(ids, mask, program=program)
        assert bool(torch.isfinite(got).all())
        out = compiled.generate(ids, attention_mask=mask, program=program, max_new_tokens=3)
        assert out.shape == (2, 12)

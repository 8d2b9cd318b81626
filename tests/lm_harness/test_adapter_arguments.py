"""What the adapter takes from lm-eval's arguments, and what it refuses."""

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from harness_samples import DEPTH, LENGTH, PROGRAMS, programs_run, scores_of, texts_of
from polar_fx.errors import InputError
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu
from polar_fx.predictor.policy import Policy
from polar_fx.predictor.saved import save_selector
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.program import Program
from polar_fx.questions import DIRECT

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'polar_fx[harness]'")

from lm_eval.api.registry import get_model  # pyright: ignore[reportMissingImports]

from polar_fx.lm_harness import PolarLM, local_task

# lm-eval's and datasets' own are not ours to fail on
pytestmark = pytest.mark.filterwarnings("default")


def test_options_from_arguments(folder: Path) -> None:
    text = (
        f"pretrained={folder},backend=eager,dtype=bfloat16,max_length=48,policy=skip "
        "3,max_gen_toks=7"
    )
    lm = get_model("polar_fx").create_from_arg_string(
        text, {"batch_size": "2", "device": "cpu", "max_batch_size": None}
    )
    assert (lm.max_length, lm.max_gen_toks, lm.batch_size, lm.device.type) == (48, 7, 2, "cpu")
    assert (
        lm.compiled.dtype == torch.bfloat16
        and Program.parse("skip 3", DEPTH) in lm.compiled.dispatcher.prepared
    )
    assert get_model("hf").__name__ == "HFLM"  # others are known beside it


def test_a_saved_predictor_and_policy_from_arguments(
    folder: Path, made: Any, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    selector = Selector(
        Menu.of(PROGRAMS), Features(2, 8), network=SelectorNetwork(64, len(PROGRAMS) + 1, width=0)
    )
    save_selector(
        selector,
        tmp_path,
        model=made.library.model_fingerprint,
        policy=Policy.parse("steps<=1", DEPTH),
    )
    lm = PolarLM(
        str(folder), backend="eager", max_length=LENGTH, predictor=str(tmp_path), batch_size=4
    )
    contexts = [f"{a}{b}" for a in "abc" for b in "123"]
    scores_of(lm, [(c, "=") for c in contexts])
    ids = torch.tensor([tokenizer.encode(c) for c in contexts])
    wanted = [
        str(d.program)
        for d in made.dispatch_by(selector, policy="steps<=1", unprepared="link").choose(ids)
    ]
    assert len(set(wanted)) > 1 and lm.report()["policy"] == "steps<=1"
    assert programs_run(lm) == {p: wanted.count(p) for p in wanted}


def test_refusals_name_value_and_remedy(
    folder: Path, compiled: Any, tokenizer: Any, tmp_path: Path
) -> None:
    lm, place, bad = PolarLM(compiled, tokenizer), str(folder), cast(Any, "guess")
    (tmp_path / "file").touch()
    for message, call in {
        "needs the tokenizer": lambda: PolarLM(compiled),
        "policy='identity'.*compiled already": lambda: PolarLM(
            compiled, tokenizer, policy="identity"
        ),
        "exclude each other": lambda: PolarLM(place, program="skip 3", policy="identity"),
        "dtype is 'int8'; use one of": lambda: PolarLM(place, dtype="int8"),
        "cannot go to device='nowhere'": lambda: PolarLM(place, device="nowhere"),
        "batch_size is 'auto'": lambda: PolarLM(compiled, tokenizer, batch_size="auto"),
        "batch_size is 0": lambda: PolarLM(compiled, tokenizer, batch_size=0),
        "64 tokens.*max_length=63": lambda: scores_of(lm, [("a", "b" * 64)]),
        "0 tokens.*not empty": lambda: scores_of(lm, [("a", "")]),
        "max_gen_toks=63 leaves no room": lambda: texts_of(lm, [("a", {"max_gen_toks": 63})]),
        "unknown kind of task 'guess'": lambda: local_task("addition", tmp_path, 1, kind=bad),
        "direct@1 is a chat's": lambda: local_task("addition", tmp_path, 1, template=DIRECT),
        "cannot be written": lambda: local_task("addition", tmp_path / "file", 1),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("polar_fx.lm_harness")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="pip install"):
        __import__("polar_fx.lm_harness")

"""One program as a `torch.export` file: any batch, any number of tokens, any KV length, without
polar_fx.

Shape legend: B batch, T tokens, L KV length, V vocabulary.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polar_fx.bundle import BundleError
from polar_fx.compiled import CompiledModel, compile
from polar_fx.errors import InputError, ProgramError
from polar_fx.graph_files import export_program
from tiny_models import make, make_slots, prompts

PROGRAM = "0 (1-2)*2@0.5 3"


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compile(make("qwen3"), "eager", max_length=63, cache=False)


@pytest.fixture(scope="module")
def path(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_program(
        compiled, PROGRAM, path=tmp_path_factory.mktemp("portable") / "program.pt2"
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "tokens", "length"),
    [(3, 5, 32), (1, 9, 64), pytest.param(1, 1, 16, marks=pytest.mark.slow), (2, 1, 40)],
)
def test_it_computes_what_the_interpreter_does(
    batch: int, tokens: int, length: int, compiled: CompiledModel, path: Path
) -> None:
    """Prefill and one decoded token: logits, keys and values."""
    about: dict[str, Any] = {"polar_fx.json": ""}
    module = torch.export.load(path, extra_files=about).module()
    library, program = compiled.library, compiled.resolve(PROGRAM)
    described = json.loads(about["polar_fx.json"])
    assert (
        described["program"] == str(program)
        and described["fingerprint"] == library.model_fingerprint
    )
    assert described["slots"] == [{"heads": 2, "key_size": 16, "value_size": 16}] * 6
    mine, theirs = (make_slots(library, program, batch=batch, length=length) for _ in range(2))
    ids = torch.stack(prompts(*[tokens + 1] * batch))
    index, positions = torch.arange(length), torch.arange(tokens + 1).expand(batch, -1).contiguous()
    for part in (slice(0, tokens), slice(tokens, tokens + 1)):
        given = ids[:, part].contiguous(), positions[:, part].contiguous(), index
        got = module(*given, [t for pair in mine for t in pair])
        torch.testing.assert_close(
            got, library.interpret(program, *given, theirs), rtol=0, atol=1e-6
        )
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


IN_ANOTHER_PROCESS = """
import sys
import torch
from safetensors.torch import load_file, save_file

given = load_file(sys.argv[2])
module = torch.export.load(sys.argv[1]).module()
slots = [torch.zeros(1, 2, 32, 16) for _ in range(12)]
with torch.no_grad():
    logits = module(
        given["ids"], torch.arange(given["ids"].shape[1])[None], torch.arange(32), slots
    )
save_file({"logits": logits}, sys.argv[3])
assert not any(m.startswith(("polar_fx", "transformers")) for m in sys.modules)
"""


def test_a_process_without_polar_fx_and_transformers_runs_it(
    compiled: CompiledModel, path: Path, tmp_path: Path
) -> None:
    ids = torch.stack(prompts(7))
    save_file({"ids": ids}, tmp_path / "in")
    subprocess.run(
        [
            sys.executable,
            "-c",
            IN_ANOTHER_PROCESS,
            str(path),
            str(tmp_path / "in"),
            str(tmp_path / "out"),
        ],
        check=True,
        cwd=tmp_path,
    )
    want = compiled.forward(ids, program=PROGRAM)
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], want, rtol=0, atol=1e-5)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.pt2").write_text("mine")
    for given, error, reason in (
        (("skip 9", "x.pt2"), ProgramError, "9"),
        (("skip 1", "x.onnx"), InputError, r"files that end in \.pt2, got 'x\.onnx'"),
        (
            ("skip 1", "there.pt2"),
            BundleError,
            "exists already; name another file, or say overwrite=True",
        ),
        (
            ("skip 1", "nowhere/x.pt2"),
            BundleError,
            r"is in no folder that exists; make \S+nowhere first",
        ),
    ):
        with pytest.raises(error, match=reason):
            export_program(compiled, given[0], path=tmp_path / given[1])

    for place, error in (
        ("os.replace", OSError(28, "No space left")),
        ("torch.export.save", RuntimeError("No space left\nC++")),
    ):

        def full(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(
                BundleError, match=r"\.pt2: cannot be written: No space left; free some space"
            ):
                export_program(compiled, "skip 1", path=tmp_path / "there.pt2", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["there.pt2"] and (
        tmp_path / "there.pt2"
    ).read_text() == "mine"

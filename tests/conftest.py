"""Fixtures every test may use."""

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch.fx.config as fx_config
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tiny_bundles import Mutable

# torch.fx notes for each node where in the code it came from, which takes an eighth of a trace and
# no test reads
fx_config.do_not_emit_stack_traces = True


def pytest_collection_finish() -> None:
    """The garbage collector need not look at a million objects of imported modules again."""
    gc.collect()
    gc.freeze()


# a busy machine is no failure
settings.register_profile("polar_fx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("polar_fx")


# Files that take longest come first, so that in the end no process waits long for another.
_LONGEST = (
    "runtime/test_tiers",
    "cli/test_search",
    "bundle/test_cpp",
    "product/test_warm_start",
    "product/test_readme",
    "product/test_packaging",
    "product/test_bench_gpu",
    "bundle/test_refusals",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order whole files; within a file nothing changes."""
    rank = {f"{name}.py": place for place, name in enumerate(_LONGEST)}

    def place_of(item: pytest.Item) -> int:
        return rank.get("/".join(item.path.parts[-2:]), len(rank))

    items.sort(key=place_of)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Artifacts of the tests go to a folder of their own; the converted default model is shared
    with the user's. Regions are compiled in the test's process, unless a test asks for workers,
    each of which has torch to import first.
    """
    from polar_fx.environment import cache_dir
    from polar_fx.runtime import regions

    base = tmp_path_factory.getbasetemp()
    # one folder for all processes of a run, so that a region is compiled in one of them
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process was first
        (folder / "models").symlink_to(models, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLAR_FX_CACHE_DIR", str(folder))
        patch.setattr(regions, "_MAX_WORKERS", 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def equal_models_are_traced_once() -> Iterator[None]:
    """In a process; `traced_anew` is for tests of tracing."""
    from traced_once import models_traced_once

    with models_traced_once():
        yield


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """Each model is traced each time."""
    from traced_once import models_traced_anew

    with models_traced_anew():
        yield


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of the embedded default; tests that need meaning are skipped where it is
    not installed.
    """
    from polar_fx.errors import ModelNotFoundError
    from polar_fx.models import load_default

    try:
        return load_default()
    except ModelNotFoundError as error:
        pytest.skip(str(error).partition(";")[0])


@pytest.fixture(scope="session")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny model with three programs and a tokenizer, which nobody writes to."""
    from polar_fx.bundle import export
    from tiny_bundles import PROGRAMS, compiled_model, tokenizer_of_words

    place = tmp_path_factory.mktemp("bundles") / "bundle"
    export(compiled_model(), place, PROGRAMS, tokenizer=tokenizer_of_words())
    return place


@pytest.fixture
def mutable(whole_bundle: Path, tmp_path: Path) -> "Mutable":
    """A bundle of one's own, to be damaged or edited."""
    from tiny_bundles import Mutable

    return Mutable(
        shutil.copytree(
            whole_bundle, tmp_path / "bundle", copy_function=lambda a, b: Path(b).hardlink_to(a)
        )
    )

"""Weights in huge pages are the same tensors with the same values, and lie there once."""

import gc
import mmap
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import polar_fx
from cached_models import small
from polar_fx import huge_pages
from polar_fx.capture import KvSpec
from polar_fx.huge_pages import hold_in_huge_pages, model_tensors, page_size, zeros
from polar_fx.program import Program
from polar_fx.runtime.kv_store import KvStore

needs_pages = pytest.mark.skipif(page_size() != 2 << 20, reason="no huge pages of 2 MB here")


@pytest.fixture
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small models move as well."""
    monkeypatch.setattr(huge_pages, "_LEAST_PAGES", 0)


def large() -> list[Tensor]:
    return [torch.randn(1024, 1024) for _ in range(8)]


def asks_for_huge_pages(tensor: Tensor) -> bool:
    """Whether the mapping that holds the tensor does; it gets them if there are any left."""
    inside, address = False, tensor.data_ptr()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags"):
            return "hg" in line.split()
    raise AssertionError("the tensor lies in no mapping")


@needs_pages
def test_values_move_into_huge_pages_and_tensors_stay() -> None:
    tensors = large()
    before = [(t, t.clone(), t.data_ptr()) for t in tensors]
    assert hold_in_huge_pages(tensors) == 8 * 4 * 1024 * 1024
    for tensor, values, address in before:
        assert torch.equal(tensor, values) and tensor.data_ptr() != address
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == values.untyped_storage().nbytes()
    assert asks_for_huge_pages(tensors[0])


@needs_pages
def test_what_lies_there_stays_and_is_let_go_with_its_tensors() -> None:
    tensors = large()
    hold_in_huge_pages(tensors)
    addresses, place = [t.data_ptr() for t in tensors], tensors[0].data_ptr()
    memory = next(weakref.ref(m) for m, held in huge_pages._held.items() if place in held)
    assert hold_in_huge_pages(tensors) == 0
    assert [t.data_ptr() for t in tensors] == addresses
    tensors.clear()
    gc.collect()
    assert memory() is None


@needs_pages
def test_tensors_that_share_memory_go_on_sharing_it(few_pages: None) -> None:
    whole = torch.randn(4, 6)
    part, turned = whole[1:3, 2:], whole.t()
    assert hold_in_huge_pages([whole, part, turned])
    whole[1, 2] = -1
    assert part[0, 0] == -1 and turned[2, 1] == -1 and part.stride() == (6, 1)


@needs_pages
def test_memory_with_other_owners_stays(few_pages: None) -> None:
    """As in a `state_dict()` that somebody keeps: what is written in place is seen by all."""
    module = nn.Linear(4, 4)
    kept, address = module.state_dict(), module.weight.data_ptr()
    assert hold_in_huge_pages(module.parameters()) == 0
    assert module.weight.data_ptr() == address == kept["weight"].data_ptr()
    kept.clear()
    assert hold_in_huge_pages(module.parameters()) > 0


@needs_pages
def test_what_other_processes_share_or_torch_may_not_change_stays(few_pages: None) -> None:
    shared, empty = torch.ones(8).share_memory_(), torch.ones(0)
    with torch.inference_mode():
        frozen = torch.ones(8)
    addresses = [t.data_ptr() for t in (shared, frozen)]
    assert hold_in_huge_pages([shared, frozen, empty, torch.ones(8, device="meta")]) == 0
    assert [t.data_ptr() for t in (shared, frozen)] == addresses


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_nothing_moves_where_the_system_has_no_huge_pages(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    assert hold_in_huge_pages(large()) == 0


@needs_pages
def test_nothing_moves_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable:   20000 kB\n")
    monkeypatch.setattr(huge_pages, "_MEMORY", tmp_path / "meminfo")
    assert hold_in_huge_pages(large()) == 0


@needs_pages
def test_a_compiled_model_reads_its_parameters_there(few_pages: None) -> None:
    """A second compilation leaves them, so that the first goes on; what is written into them in
    place is seen, and tied weights stay tied.
    """
    model = small(tie_word_embeddings=True)
    names, ids = dict(model.named_parameters()), torch.arange(5)[None]
    with torch.no_grad():  # a graph of autograd would hold weights as well
        expected = model(ids).logits
    first = polar_fx.compile(model, "eager", cache=False)
    second = polar_fx.compile(model, "eager", cache=False)
    assert all(names[n] is p for n, p in model.named_parameters())
    assert all(huge_pages._lies_in_huge_pages(parameter) for parameter in names.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    program = Program.identity(first.depth)
    for compiled in (first, second):
        torch.testing.assert_close(compiled.forward(ids, program=program), expected)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    torch.testing.assert_close(first.forward(ids, program=program), 2 * expected)


@needs_pages
def test_buffers_that_share_memory_with_a_parameter_are_given_with_it(few_pages: None) -> None:
    module = nn.Linear(4, 4)
    module.register_buffer("same", module.weight.data)
    hold_in_huge_pages(model_tensors(module))
    assert module.same.data_ptr() == module.weight.data_ptr()  # type: ignore[operator]


@needs_pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_lie_in_huge_pages_if_they_are_many(dtype: torch.dtype) -> None:
    many, few = zeros((4096, 2048), dtype=dtype), zeros((3, 5), dtype=dtype)
    assert many.shape == (4096, 2048) and many.dtype == dtype and not many.any()
    assert many.data_ptr() % (2 << 20) == 0 and asks_for_huge_pages(many)
    many[7, 5] = 1
    assert few.shape == (3, 5) and few.dtype == dtype and many.sum() == 1 and not few.any()


def test_zeros_without_huge_pages_are_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "page_size", lambda: None)
    assert not zeros((4096, 2048), dtype=torch.float32).any()


@needs_pages
@pytest.mark.parametrize("refused", ["mmap", "madvise"])
def test_zeros_that_the_system_refuses_huge_pages_are_zeros(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError("not here")

    def none(*_: int, **__: int) -> mmap.mmap:
        raise OSError("no memory")

    monkeypatch.setattr(huge_pages.mmap, "mmap", Memory if refused == "madvise" else none)
    assert not zeros((4096, 2048), dtype=torch.float32).any()


@needs_pages
def test_keys_and_values_move_there_as_their_store_grows(few_pages: None) -> None:
    spec = KvSpec(heads=2, key_size=16, value_size=8, dtype=torch.bfloat16)
    store = KvStore(torch.device("cpu"))
    first = store.take(spec, 3)
    for part in store.tensors(spec):
        part[first] = 5.0
    more = store.take(spec, 40)
    for part in store.tensors(spec):
        assert asks_for_huge_pages(part) and (part[first] == 5).all() and not part[more].any()

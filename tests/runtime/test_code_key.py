"""The key of compiled code, and the cache that holds it in memory."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from places import printed_in_processes
from polar_fx.backends import AotInductorBackend, Backend, EagerBackend, InductorBackend, ShapeClass
from polar_fx.backends.inductor import REGION_PASSES
from polar_fx.passes.matvec_to_reduction import MatvecToReduction
from polar_fx.runtime.code_key import RegionRecord, VariantCache, VariantKey, target_of

CPU = torch.device("cpu")
OPTIONS = {"max_autotune": False}
FIELDS = [f.name for f in dataclasses.fields(VariantKey)]


def _key(**change: Any) -> VariantKey:
    """A key made of fixed facts; `change` replaces arguments of `VariantKey.of`."""
    given: dict[str, Any] = dict(
        kind="region",
        graph="ab" * 32,
        shape=ShapeClass(1, None, 64),
        backend=AotInductorBackend(OPTIONS),
        device=CPU,
        dtype=torch.float32,
    )
    return VariantKey.of(**{**given, **change})


def _changed(key: VariantKey, before: VariantKey | None = None) -> set[str]:
    """Names of the fields in which two keys differ."""
    return {name for name, _ in key.facts().items() - (before or _key()).facts().items()}


# ------------------------------------------------------------------------------------------ the key


def test_equal_set_ups_give_equal_keys() -> None:
    assert _key() == _key() and _key() is not _key()
    assert _key().digest == _key().digest and hash(_key()) == hash(_key())
    assert len(_key().digest) == 64 and set(_key().digest) <= set("0123456789abcdef")


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_enters_the_digest(name: str) -> None:
    value = getattr(_key(), name)
    other = dataclasses.replace(
        _key(), **{name: value + 1 if isinstance(value, int) else value + "x"}
    )
    assert other != _key() and other.digest != _key().digest
    assert _changed(other) == {name}


def test_facts_are_the_fields_and_plain_enough_for_the_store() -> None:
    facts = _key().facts()
    assert list(facts) == FIELDS and json.loads(json.dumps(facts)) == facts


def test_no_field_can_pass_for_another() -> None:
    """Fields are told apart by name: moving text from one to the next makes another key."""
    one = dataclasses.replace(_key(), graph="ab", program="c")
    assert one.digest != dataclasses.replace(_key(), graph="a", program="bc").digest


SET_UPS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "what is compiled": ({"kind": "whole"}, {"kind", "builder"}),
    "another graph": ({"graph": "cd" * 32}, {"graph"}),
    "another program": ({"program": "0 2 1 /3"}, {"program"}),
    "passes before the backend's": ({"passes": ("0123456789abcdef",)}, {"passes"}),
    "several rows": ({"shape": ShapeClass(None, None, 64)}, {"bucket"}),
    "one token": ({"shape": ShapeClass(1, 1, 64)}, {"bucket"}),
    "another KV length": ({"shape": ShapeClass(1, None, 80)}, {"bucket"}),
    "another dtype": ({"dtype": torch.bfloat16}, {"dtype"}),
    "another compiler": ({"backend": InductorBackend(OPTIONS)}, {"backend"}),
    "other options": ({"backend": AotInductorBackend({"max_autotune": True})}, {"options"}),
    "an option more": ({"backend": AotInductorBackend({**OPTIONS, "debug": True})}, {"options"}),
    "no passes of the backend": ({"backend": AotInductorBackend(OPTIONS, passes=())}, {"passes"}),
    "a pass's option": (
        {"backend": AotInductorBackend(OPTIONS, (MatvecToReduction(2), *REGION_PASSES[1:]))},
        {"passes"},
    ),
    "passes in another order": (
        {"backend": AotInductorBackend(OPTIONS, REGION_PASSES[::-1])},
        {"passes"},
    ),
    "another device": ({"device": torch.device("meta")}, {"device", "target", "threads"}),
}


@pytest.mark.parametrize("name", SET_UPS)
def test_what_changes_the_code_changes_its_field(name: str) -> None:
    change, fields = SET_UPS[name]
    assert _changed(_key(**change)) == fields


def test_the_order_of_options_does_not_matter() -> None:
    orders = ({"debug": True, **OPTIONS}, {**OPTIONS, "debug": True})
    assert list(orders[0]) != list(orders[1])
    assert len({_key(backend=AotInductorBackend(options)).digest for options in orders}) == 1


def test_the_number_of_threads_is_part_of_a_key_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _key()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before.threads + 3)
    assert _changed(_key(), before) == {"threads"} and _key().threads == before.threads + 3


def test_the_processors_instructions_are_part_of_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, info = _key(), tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nflags : sse2 avx2 an_instruction_of_its_own\n", encoding="utf-8"
    )
    monkeypatch.setattr("polar_fx.environment._PROCESSOR", info)
    target_of.cache_clear()
    try:
        assert _changed(_key(), before) == {"target"}
    finally:
        target_of.cache_clear()


def test_another_torch_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _key()
    monkeypatch.setattr(torch.version, "git_version", "0" * 40)
    assert _changed(_key(), before) == {"torch_version"}


def test_digests_are_equal_in_every_process() -> None:
    here, threads = Path(__file__).parent, torch.get_num_threads()
    code = (
        f"import torch, test_code_key as t; torch.set_num_threads({threads}); "
        "print(t._key().digest)"
    )
    seen = {printed.strip() for printed in printed_in_processes(code, here)}
    assert seen == {_key().digest}


def test_every_backend_has_a_key_of_its_own() -> None:
    backends: Sequence[Backend] = (AotInductorBackend(), InductorBackend(), EagerBackend())
    assert len({_key(backend=b).digest for b in backends}) == 3


# ---------------------------------------------------------------------------------------- the cache


def _region(operands: list[Tensor]) -> Sequence[Tensor]:
    return operands


def _named(name: str) -> VariantKey:
    return dataclasses.replace(_key(), program=name)


def _filled(limit: int, **sizes: int) -> VariantCache:
    cache = VariantCache(limit)
    for name, size in sizes.items():
        cache.put(_named(name), _region, num_bytes=size)
    return cache


def _held(cache: VariantCache, names: str) -> str:
    """Which of `names` are there; looks in the order given, and so uses them."""
    return "".join(n for n in names if cache.get(_named(n)) is not None)


def test_what_was_put_in_comes_out_as_long_as_it_fits() -> None:
    cache = _filled(30, a=10, b=10, c=10)
    assert _held(cache, "abc") == "abc" and len(cache) == 3 and cache.num_bytes == 30
    assert cache.get(_named("a")) is _region and cache.get(_named("d")) is None


def test_the_least_recently_used_is_dropped_first() -> None:
    cache = _filled(30, a=10, b=10, c=10)
    cache.get(_named("a"))
    assert cache.put(_named("d"), _region, num_bytes=10) == [_named("b")]
    assert cache.put(_named("e"), _region, num_bytes=20) == [_named("c"), _named("a")]
    assert _held(cache, "abcde") == "de" and cache.num_bytes == 30


def test_putting_a_key_again_replaces_it_and_counts_as_use() -> None:
    cache = _filled(30, a=10, b=10)
    assert cache.put(_named("a"), _region, num_bytes=15) == []
    assert cache.num_bytes == 25 and len(cache) == 2
    assert cache.put(_named("c"), _region, num_bytes=10) == [_named("b")]


def test_a_variant_larger_than_the_cache_stays_alone_until_the_next() -> None:
    cache = _filled(30, a=10, b=10)
    assert cache.put(_named("c"), _region, num_bytes=100) == [_named("a"), _named("b")]
    assert _held(cache, "abc") == "c"
    assert cache.put(_named("d"), _region, num_bytes=1) == [_named("c")] and cache.num_bytes == 1


def test_a_cache_without_room_still_holds_the_one_in_use() -> None:
    cache = _filled(0, a=1)
    assert _held(cache, "a") == "a"
    assert cache.put(_named("b"), _region, num_bytes=1) == [_named("a")] and len(cache) == 1


def test_dropping_gives_the_room_back() -> None:
    cache = _filled(20, a=10, b=10)
    cache.drop(_named("a"))
    cache.drop(_named("never there"))
    assert (
        cache.num_bytes == 10
        and cache.put(_named("c"), _region, num_bytes=10) == []
        and _held(cache, "abc") == "bc"
    )


def test_a_record_says_compiled_unless_it_was_loaded() -> None:
    assert (
        RegionRecord("layer_kind_0", "B=1 T=1 L=64", 0.5).source,
        RegionRecord("a", "b", 0.1).num_bytes,
    ) == ("compiled", 0)

"""What all search methods promise, and what each finds."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_fx.errors import InputError
from polar_fx.program import Edit, Op, Program
from polar_fx.search.config import SearchConfig
from polar_fx.search.methods.edits import Sampler, layer_mask, max_steps, single_edits, union_mask
from polar_fx.search.methods.evolution import cross, mutate
from polar_fx.search.methods.registry import METHODS, get_method, question_seed
from toy_search import HIDDEN, constant, drive, likeness, sparse

configs = st.builds(
    SearchConfig,
    simulations=st.integers(1, 60),
    max_length=st.integers(1, 4),
    max_extra=st.integers(1, 4),
    max_steps_ratio=st.sampled_from([1.0, 1.3, 2.0, 3.0]),
    nested=st.booleans(),
    exploration=st.sampled_from([0.0, 1.4]),
    length_penalty=st.sampled_from([0.0, 5.0]),
    random_child=st.sampled_from([0.0, 0.1, 1.0]),
    global_visits=st.booleans(),
    widening_factor=st.sampled_from([0.0, 2.0, 50.0]),
    max_edits=st.integers(1, 4),
    beam_width=st.integers(1, 4),
    population=st.integers(1, 8),
)


def find(
    name: str, depth: int, *, config: SearchConfig, seed: int, reward=constant
) -> list[Program]:
    return drive(get_method(name)(depth, config, random.Random(seed)), reward)


# All methods


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(METHODS)), st.integers(1, 9), configs, st.integers(0, 99))
def test_each_program_once_within_the_budget(
    name: str, depth: int, config: SearchConfig, seed: int
) -> None:
    draw = random.Random(seed)
    programs = find(name, depth, config=config, seed=seed, reward=lambda program: draw.random())
    assert programs[0] == Program.identity(depth)
    assert len(set(programs)) == len(programs) <= 1 + config.simulations
    assert all(
        1 <= program.num_steps <= max(depth, max_steps(depth, config)) for program in programs
    )
    assert all(program.depth == depth and not program.blends for program in programs)
    if name != "mcts" or not config.nested:
        assert all(program.is_segmentable for program in programs)


@pytest.mark.parametrize("name", METHODS)
def test_the_identity_comes_first_and_alone(name: str) -> None:
    assert next(get_method(name)(12, SearchConfig(), random.Random(0))) == [Program.identity(12)]


@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_used(name: str) -> None:
    assert len(find(name, 30, config=SearchConfig(simulations=150), seed=0)) == 151


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_gives_one_search(name: str) -> None:
    runs = [find(name, 12, config=SearchConfig(), seed=seed, reward=likeness) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert name == "scan" or runs[0] != runs[2]


@pytest.mark.parametrize("name", METHODS)
def test_one_layer_has_no_endless_search(name: str) -> None:
    """Of one layer there are two programs within twice the depth."""
    assert find(name, 1, config=SearchConfig(), seed=0) == [
        Program.identity(1),
        Program.from_path([0, 0], 1),
    ]


@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_look_at(name: str) -> None:
    assert find(name, 1, config=SearchConfig(max_steps_ratio=1), seed=0) == [Program.identity(1)]


@pytest.mark.parametrize("name", ["mcts", "beam", "evolution"])
def test_a_wrong_number_of_rewards_is_noticed(name: str) -> None:
    search = get_method(name)(12, SearchConfig(), random.Random(0))
    next(search)
    with pytest.raises(ValueError):
        search.send([0.0, 0.0])


# What they find


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["mcts", "beam", "evolution"])
def test_a_hidden_program_is_found_by_likeness(name: str, seed: int) -> None:
    """Rewards of neighbors differ by a few percent, so exploration has to weigh little; random
    search finds it 2 times in 10.
    """
    config = SearchConfig(
        simulations=400,
        max_length=2,
        max_extra=1,
        exploration=0.1,
        length_penalty=0,
        widening_factor=4.0,
    )
    assert HIDDEN in find(name, 12, config=config, seed=seed, reward=likeness)


@pytest.mark.parametrize("penalty", [0.0, 5.0])
@pytest.mark.parametrize("name", ["mcts", "beam", "evolution"])
def test_sparse_rewards_are_found(name: str, penalty: float) -> None:
    config = SearchConfig(simulations=400, length_penalty=penalty)
    solved = [
        any(map(sparse, find(name, 12, config=config, seed=seed, reward=sparse)))
        for seed in range(10)
    ]
    assert sum(solved) >= 8


@pytest.mark.parametrize("name", ["mcts", "random"])
def test_edits_have_no_position_bias(name: str) -> None:
    """Where edits are placed from left to right only, half of them are in the last third
    (RE-PoLar).
    """
    thirds = [0, 0, 0]
    for seed in range(20):
        for program in find(name, 30, config=SearchConfig(length_penalty=0), seed=seed):
            for layer in range(30):
                thirds[layer // 10] += program.path.count(layer) != 1
    # Blocks of up to 4 layers cover the first and the last layers a little less often than others.
    assert all(0.28 < third / sum(thirds) < 0.40 for third in thirds)
    assert abs(thirds[0] - thirds[2]) / sum(thirds) < 0.04


# Names and seeds


def test_names() -> None:
    assert get_method("mcts") is METHODS["mcts"]
    with pytest.raises(
        InputError,
        match="unknown search method 'astar'; use one of mcts, scan, random, beam, evolution",
    ):
        get_method("astar")


def test_question_seeds() -> None:
    """The number is fixed: it must not change with the process, the machine or a release."""
    assert question_seed(0, "a") == 14946763695692304074
    assert (
        len({question_seed(seed, name) for seed in (0, 1, 10) for name in ("a", "b", "0 a", "")})
        == 12
    )


# Edits


def test_single_edits() -> None:
    edits = single_edits(30, 4, max_extra=4)
    assert len(edits) == len(set(edits)) == 5 * (30 + 29 + 28 + 27)
    assert edits[:2] == (Edit(0, 1, Op.SKIP), Edit(1, 1, Op.SKIP)) and edits[-1] == Edit(
        26, 4, Op.REPEAT, 5
    )
    assert len({Program.from_edits([edit], 30) for edit in edits}) == len(edits)
    assert single_edits(30, 4, max_extra=4) is edits  # shared by all searches
    assert len(single_edits(2, 4, max_extra=1)) == 2 * (2 + 1)


def test_masks() -> None:
    assert layer_mask(Edit(3, 2, Op.SKIP)) == 0b11000
    assert (
        union_mask((Edit(0, 1, Op.SKIP), Edit(3, 2, Op.REPEAT))) == 0b11001 and union_mask(()) == 0
    )


def test_longest_path() -> None:
    assert [
        max_steps(20, SearchConfig(max_steps_ratio=ratio)) for ratio in (1, 1.15, 2.0, 2.04)
    ] == [20, 23, 40, 40]
    assert max_steps(4096, SearchConfig()) == 4096  # what a program may have at most


def test_scan_is_every_single_edit() -> None:
    config = SearchConfig(simulations=1000)
    assert find("scan", 30, config=config, seed=0)[1:] == [
        Program.from_edits([edit], 30) for edit in single_edits(30, 4, max_extra=4)
    ]
    # Of 4 layers, skipping all is no program, and 4 more runs of 2 layers are too long.
    assert len(find("scan", 4, config=config, seed=0)) == 1 + (4 + 3 + 2) + (
        4 * 4 + 2 * 3 + 1 * 2 + 1
    )


@pytest.mark.parametrize("simulations", [20, 57, 114, 200, 400])
def test_a_small_scan_is_spread_evenly(simulations: int) -> None:
    programs = find("scan", 30, config=SearchConfig(simulations=simulations), seed=0)[1:]
    every = [Program.from_edits([edit], 30) for edit in single_edits(30, 4, max_extra=4)]
    places = [every.index(program) for program in programs]
    gaps = {after - before for before, after in pairwise(places)}
    assert len(places) == simulations and max(gaps) - min(gaps) <= 1
    assert abs(sum(program.num_steps < 30 for program in programs) - simulations / 5) <= 1


def test_random_programs_have_any_number_of_edits() -> None:
    sampler = Sampler(30, SearchConfig(), rng=random.Random(0))
    drawn = [sampler.random_edits() for _ in range(2000)]
    counts = Counter(map(len, drawn))
    assert counts.keys() == {1, 2, 3, 4} and all(430 < count < 570 for count in counts.values())
    for edits in drawn:  # none overlap
        assert union_mask(edits).bit_count() == sum(edit.length for edit in edits)


def test_beam_goes_on_from_the_best() -> None:
    """One right edit is worth 1: from the second round on, nearly all programs have it."""
    config = SearchConfig(beam_width=1, max_edits=2, simulations=120, max_length=1, max_extra=1)
    programs = find(
        "beam", 30, config=config, seed=0, reward=lambda program: float(3 not in program.path)
    )
    first, second = programs[1:61], programs[61:]
    assert sum(3 not in program.path for program in first) == 1
    assert all(3 not in program.path for program in second)


def test_mutation_changes_one_edit() -> None:
    rng = random.Random(0)
    sampler, edits = (
        Sampler(30, SearchConfig(), rng=rng),
        (Edit(3, 1, Op.SKIP), Edit(9, 2, Op.REPEAT)),
    )
    sizes = set()
    for _ in range(100):
        child = mutate(edits, sampler, rng=rng)
        sizes.add(len(child))
        assert len(set(child) ^ set(edits)) <= 2 and set(child) & set(edits)
        assert len(mutate((), sampler, rng=rng)) == 1
    assert sizes == {1, 2, 3}


def test_crossing_takes_edits_of_both() -> None:
    one, other = (
        (Edit(3, 1, Op.SKIP), Edit(9, 2, Op.REPEAT)),
        (Edit(10, 1, Op.SKIP), Edit(20, 1, Op.REPEAT)),
    )
    rng = random.Random(0)
    children = [cross(one, other, max_edits=3, rng=rng) for _ in range(200)]
    assert any(set(child) & set(one) and set(child) & set(other) for child in children)
    assert all(set(child) <= {*one, *other} and len(child) <= 3 for child in children)
    assert not any({one[1], other[0]} <= set(child) for child in children)  # both edit layer 10

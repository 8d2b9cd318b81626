"""Monte Carlo tree search: its tree, its scores, its budget. What it finds is in
test_methods.

PYTHONPATH=tests/support python tests/search/test_mcts.py writes the golden trees anew; read the
diff before committing it.
"""

import difflib
import math
import random
import sys
import time
import tracemalloc
from collections.abc import Callable

import pytest

from places import GOLDEN
from polar_fx.program import Program
from polar_fx.search.config import SearchConfig
from polar_fx.search.methods.edits import runs
from polar_fx.search.methods.mcts import Node, Tree, format_tree
from toy_search import constant, drive, sparse

TREES = GOLDEN / "search"


def grown(
    depth: int, reward: Callable[[Program], float] = constant, *, seed: int = 0, **settings
) -> Tree:
    tree = Tree(depth, SearchConfig(**settings), rng=random.Random(seed))
    drive(tree.search(), reward)
    return tree


def without(layer: int) -> Callable[[Program], float]:
    return lambda program: float(layer not in program.path)


# Golden trees

CASES: dict[str, Callable[[], Tree]] = {
    "mcts": lambda: grown(6, without(2), simulations=40),
    "mcts-nested": lambda: grown(6, without(2), simulations=40, nested=True, random_child=0.1),
    "mcts-whole": lambda: grown(2, without(1), length_penalty=0.0, max_length=1, max_extra=1),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    want, got = (TREES / f"{name}.txt").read_text(encoding="utf-8"), format_tree(CASES[name]())
    diff = "\n".join(
        difflib.unified_diff(want.splitlines(), got.splitlines(), "golden", "now", lineterm="")
    )
    assert got == want, (
        f"{diff}\nif that is meant: PYTHONPATH=tests/support python tests/search/test_mcts.py"
    )


# Scores


def test_score_by_hand() -> None:
    tree = Tree(4, SearchConfig(), rng=random.Random(0))
    node = Node(Program.from_path([0, 1, 3], 4), visits=4, total=2.0)
    # 2/4 + sqrt(2) * sqrt(2.302585 / 4) - 5 * 3/4
    assert tree.score(node, math.log(10)) == pytest.approx(0.5 + 1.072983 - 3.75, abs=1e-6)
    assert tree.score(Node(Program.identity(4)), 0.0) == math.inf
    plain = Tree(4, SearchConfig(exploration=1.8, length_penalty=3.0), rng=random.Random(0))
    assert plain.score(node, math.log(10)) == pytest.approx(0.5 + 1.365684 - 2.25, abs=1e-6)


def two_children(**settings) -> tuple[Tree, Node, list[Node]]:
    """A node of 4 visits in a search of 100: its first child is better, its second less visited."""
    tree = Tree(4, SearchConfig(**settings), rng=random.Random(0))
    tree.root.visits = 100
    children = [
        Node(Program.from_path([0, 1, 2], 4), visits=3, total=3.0),
        Node(Program.from_path([0, 1, 3], 4), visits=1, total=0.0),
    ]
    return tree, Node(Program.identity(4), visits=4, children=children), children


def test_total_or_parent_visits() -> None:
    """Total: 1 + 1.75 < 0 + 3.03. Parent: 1 + 0.96 > 0 + 1.67."""
    tree, node, (better, fresher) = two_children()
    assert tree.best_child(node) is fresher
    tree, node, (better, fresher) = two_children(global_visits=False)
    assert tree.best_child(node) is better


def test_shorter_programs_are_preferred_and_first_ones_among_equals() -> None:
    tree, node, (first, second) = two_children()
    first.visits = second.visits = 1
    first.total = second.total = 0.5
    assert tree.best_child(node) is first
    # 5 * 1/4 beats 0.5
    node.children.append(shorter := Node(Program.from_path([0, 1], 4), visits=1))
    assert tree.best_child(node) is shorter


def test_random_child() -> None:
    tree, node, children = two_children(random_child=0.5)
    chosen = [tree.best_child(node) for _ in range(1000)]
    assert 200 < chosen.count(children[0]) < 300


# Widening


@pytest.mark.parametrize("visits, children", [(0, 1), (1, 2), (2, 3), (4, 4), (5, 5), (200, 29)])
def test_widening_by_hand(visits: int, children: int) -> None:
    """max(1, ceil(2 * sqrt(visits)))."""
    tree = Tree(4, SearchConfig(), rng=random.Random(0))
    assert tree.max_children(Node(Program.identity(4), visits=visits)) == children


def test_nodes_widen_with_their_visits() -> None:
    tree = grown(30)
    assert len(tree.root.children) == 29
    assert all(len(node.children) <= tree.max_children(node) for node in tree.nodes.values())
    assert sum(len(node.children) > 1 for node in tree.nodes.values()) > 10


def test_without_widening_a_search_is_a_chain() -> None:
    tree = grown(30, widening_factor=0.0, simulations=20)
    assert {len(node.children) for node in tree.nodes.values()} <= {0, 1} and len(tree.nodes) > 5


# The graph


def parents(tree: Tree, node: Node) -> list[Node]:
    return [other for other in tree.nodes.values() if node in other.children]


def test_edits_in_any_order_meet() -> None:
    """3 layers that are skipped, kept or run twice: all but the empty program, each once."""
    config = SearchConfig(
        max_length=1, max_extra=1, length_penalty=0.0, simulations=2000, widening_factor=9.0
    )
    tree = Tree(3, config, rng=random.Random(0))
    assert len(drive(tree.search(), constant)) == len(tree.nodes) == 3**3 - 1
    both = tree.nodes[(1,)]  # skip 0, skip 2
    assert {node.program.path for node in parents(tree, both)} == {(1, 2), (0, 1)}
    three = tree.nodes[(0, 0, 1, 1)]  # repeat 0, repeat 1, skip 2
    assert {node.program.path for node in parents(tree, three)} == {
        (0, 0, 1, 1, 2),
        (0, 0, 1),
        (0, 1, 1),
    }


def test_one_path_is_one_node_however_it_is_cut() -> None:
    tree = grown(3, length_penalty=0.0, simulations=2000, max_extra=1, widening_factor=9.0)
    assert {node.program.path for node in parents(tree, tree.nodes[(0,)])} == {
        (0, 1, 2),
        (0, 1),
        (0, 2),
    }


@pytest.mark.parametrize("nested", [False, True])
def test_children_are_one_edit_away(nested: bool) -> None:
    tree = grown(5, simulations=150, nested=nested, length_penalty=0.5)
    for node in tree.nodes.values():
        path, reachable = node.program.path, set()
        for edit in tree.actions:
            if nested and edit.start + edit.length > len(path):
                continue
            if not nested and any(
                path.count(layer) != 1 for layer in range(edit.start, edit.start + edit.length)
            ):
                continue
            start = edit.start if nested else path.index(edit.start)
            if runs(edit):
                reachable.add(node.program.repeat(start, edit.length, edit.times))
            elif edit.length < len(path):
                reachable.add(node.program.skip(start, edit.length))
        assert {child.program for child in node.children} <= reachable
        assert len({child.program for child in node.children}) == len(node.children)
        assert all(child.rank > node.rank for child in node.children)  # no cycles


def test_nested_edits_leave_the_segments() -> None:
    tree = grown(12, sparse, nested=True)
    assert not all(node.program.is_segmentable for node in tree.nodes.values())
    assert max(node.program.num_steps for node in tree.nodes.values()) <= 24


def test_visits_and_rewards_add_up() -> None:
    tree = grown(8, sparse, simulations=300)
    assert tree.root.visits == 1 + tree.num_simulations == 301
    rewards = {node.program: node.reward for node in tree.nodes.values()}
    assert rewards == {program: sparse(program) for program in rewards}
    for node in tree.nodes.values():
        assert node.visits >= 1 and 0 <= node.total <= node.visits
        if node.children:  # every walk but the first went on to one of them
            assert node.visits - 1 <= sum(child.visits for child in node.children)
        else:  # a program is counted again only where there is nothing below it
            assert node.visits == 1 or node.exhausted


# The budget


def test_a_walk_that_finds_nothing_new_counts() -> None:
    tree = Tree(4, SearchConfig(simulations=500), rng=random.Random(0))
    programs = drive(tree.search(), constant)
    assert tree.num_simulations == 500 and len(programs) < 501 and tree.root.visits == 501


def test_a_search_ends_where_everything_was_tried() -> None:
    tree = grown(2, length_penalty=0.0, simulations=10_000)
    # Within 4 steps: 0-4 runs of each layer, not none of both, or both layers twice in turn.
    assert (
        len(tree.nodes)
        == sum(1 <= zeros + ones <= 4 for zeros in range(5) for ones in range(5)) + 1
    )
    assert tree.root.closed and tree.num_simulations < 1000


def test_nodes_hold_no_actions() -> None:
    """A thousand trees that held their lists of actions took 13 GB (RE-PoLar), 65 KB a node."""
    tracemalloc.start()
    try:
        tree = grown(30)
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size / len(tree.nodes) < 2500
    assert (
        not hasattr(tree.root, "__dict__")
        and max(sys.getsizeof(node.tried) for node in tree.nodes.values()) < 150
    )
    assert grown(30).actions is tree.actions


def test_a_search_costs_little_beside_a_model() -> None:
    """200 simulations at depth 30 take 4 ms of a quiet core; a limit that a busy one meets as
    well.
    """
    times = []
    for seed in range(5):
        start = time.perf_counter()
        grown(30, seed=seed)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


if __name__ == "__main__":
    TREES.mkdir(parents=True, exist_ok=True)
    for case, make in CASES.items():
        (TREES / f"{case}.txt").write_text(format_tree(make()), encoding="utf-8")

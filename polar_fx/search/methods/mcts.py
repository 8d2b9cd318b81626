"""Monte Carlo tree search over programs (PoLar, App. B; CoLa; RE-PoLar).

A node is a program, an action one further edit of it. Edits are placed over the identity in any
order, so the nodes form a directed acyclic graph: A then B and B then A is one node, and so is any
other way to its path.
"""

import math
import random
from dataclasses import dataclass, field

from ...program import Program
from ..config import SearchConfig
from .edits import Search, layer_mask, max_steps, runs, single_edits

# random actions tried on a node before its untried ones are listed; the choice is uniform either
# way
_MAX_DRAWS = 32


@dataclass(slots=True, eq=False)
class Node:
    """A program of the search.

    `edited` are the layers its edits changed, as the bits of an int; they follow from the path, so
    every way to a node gives the same set. Nested edits change positions and leave it 0. Children
    have a higher `rank`, so no walk goes in a circle.
    """

    program: Program
    edited: int = 0
    rank: int = 0
    reward: float | None = None
    """Of the program itself; None until it was evaluated."""
    visits: int = 0
    total: float = 0.0
    """Sum of the rewards of all walks through the node: R of the score."""
    children: list["Node"] = field(default_factory=list)
    tried: int = 0
    """Actions taken, as bits by their index: a list of actions in each node would fill the memory
    (RE-PoLar).
    """
    exhausted: bool = False
    """No action is left to try."""
    closed: bool = False
    """No action is left to try here or below."""


class Tree:
    """The search of one question. `search` runs it; `format_tree` shows what it found."""

    def __init__(self, depth: int, config: SearchConfig, *, rng: random.Random) -> None:
        self.depth, self.config, self.rng = depth, config, rng
        self.max_steps = max_steps(depth, config)
        # Nested actions address positions of the current path (PoLar, App. B.3), others original
        # layers (RE-PoLar).
        self.actions = single_edits(
            self.max_steps if config.nested else depth,
            config.max_length,
            max_extra=config.max_extra,
        )
        self.root = Node(Program.identity(depth))
        self.nodes = {self.root.program.path: self.root}
        self.num_simulations = 0

    def search(self) -> Search:
        """Yield one program at a time, since each choice waits for the reward before it (PoLar,
        App.

        B, algorithm 1).
        """
        (self.root.reward,) = yield [self.root.program]
        self.backward([self.root], self.root.reward)
        while self.num_simulations < self.config.simulations and not self.root.closed:
            self.num_simulations += 1
            walk = self.select()
            end = walk[-1]
            if end.reward is None:
                (end.reward,) = yield [end.program]
            # A program is evaluated once. Where a walk ends on a known one, nothing being left to
            # try, its reward counts again.
            self.backward(walk, end.reward)

    def select(self) -> list[Node]:
        """Walk down from the root to a program that is new or has nothing below it."""
        walk = [node := self.root]
        while True:
            child = (
                self.expand(node)
                if len(node.children) < self.max_children(node) and not node.exhausted
                else None
            )
            if child is None:
                if not node.children:
                    return walk
                child = self.best_child(node)
            walk.append(child)
            if child.reward is None:
                return walk
            node = child

    def max_children(self, node: Node) -> int:
        """Progressive widening: some 570 actions at depth 30 would use up the budget at the root
        (RE-PoLar).
        """
        return max(
            1, math.ceil(self.config.widening_factor * node.visits**self.config.widening_exponent)
        )

    def expand(self, node: Node) -> Node | None:
        """Add the child of a random untried action: a new program, or one other edits led to.

        None if no action is left.
        """
        while (index := self._draw(node)) is not None:
            node.tried |= 1 << index
            child = self._child(node, index)
            # Only nested edits can undo one another, or give one path in two ways.
            if child.rank > node.rank and child not in node.children:
                node.children.append(child)
                return child
        node.exhausted = True
        return None

    def best_child(self, node: Node) -> Node:
        """The child with the highest score, the first added if equal; a random one with probability
        `random_child`.
        """
        # CoLa, App. B
        if self.config.random_child and self.rng.random() < self.config.random_child:
            return self.rng.choice(node.children)
        # V: each walk visits the root, so its visits are all simulations, with that of the identity
        # (as CoLa's index + 1).
        log_visits = math.log((self.root if self.config.global_visits else node).visits)
        return max(node.children, key=lambda child: self.score(child, log_visits))

    def score(self, node: Node, log_visits: float) -> float:
        """R/v + c * sqrt(ln V / v) - lambda * |pi| / D (PoLar, App.

        B.3; RE-PoLar for its typesetting).
        """
        if not node.visits:
            return math.inf
        length = len(node.program.path) / self.depth
        exploration = self.config.exploration * math.sqrt(log_visits / node.visits)
        return node.total / node.visits + exploration - self.config.length_penalty * length

    def backward(self, walk: list[Node], reward: float) -> None:
        """Count a simulation in each node it walked through."""
        for node in reversed(walk):
            node.visits += 1
            node.total += reward
            node.closed = node.exhausted and all(child.closed for child in node.children)

    def _draw(self, node: Node) -> int | None:
        """A random untried action, each equally likely, or None."""
        count = len(self.actions)
        for _ in range(_MAX_DRAWS):
            if self._is_open(node, index := self.rng.randrange(count)):
                return index
        untried = [index for index in range(count) if self._is_open(node, index)]
        return self.rng.choice(untried) if untried else None

    def _is_open(self, node: Node, index: int) -> bool:
        """Whether an action is untried and gives a program: edits apart, at least one step, not too
        many.
        """
        if node.tried >> index & 1:
            return False
        edit, num_steps = self.actions[index], len(node.program.path)
        if self.config.nested:
            if edit.start + edit.length > num_steps:
                return False
        elif layer_mask(edit) & node.edited:
            return False
        return 0 < num_steps + edit.length * (runs(edit) - 1) <= self.max_steps

    def _child(self, node: Node, index: int) -> Node:
        """The node an action leads to, found or made."""
        edit, path = self.actions[index], node.program.path
        # A layer not yet edited occurs once, with the rest of its block right behind it.
        start = edit.start if self.config.nested else path.index(edit.start)
        stop = start + edit.length
        path = path[:start] + path[start:stop] * runs(edit) + path[stop:]
        child = self.nodes.get(path)
        if child is None:
            edited = 0 if self.config.nested else node.edited | layer_mask(edit)
            rank = node.rank + 1 if self.config.nested else edited.bit_count()
            child = self.nodes[path] = Node(Program.from_path(path, self.depth), edited, rank)
        return child


def mcts(depth: int, config: SearchConfig, rng: random.Random) -> Search:
    """Search by Monte Carlo tree search; see `Tree`."""
    return Tree(depth, config, rng=rng).search()


def format_tree(tree: Tree) -> str:
    """A node a line, children indented, with visits, mean reward of its walks, and its own reward.

    A node with several parents has a line under each; what is below it comes with the first, the
    others say `above`.
    """
    lines: list[str] = []
    shown: set[Node] = set()
    todo = [(tree.root, 0)]
    while todo:
        node, level = todo.pop()
        mean = node.total / node.visits if node.visits else 0.0
        known = "?" if node.reward is None else f"{node.reward:g}"
        above = ", above" if node in shown else ""
        lines.append(
            f"{'  ' * level}{node.program}: visits {node.visits}, mean {mean:.3f}, reward "
            f"{known}{above}"
        )
        if node not in shown:
            shown.add(node)
            todo += [(child, level + 1) for child in reversed(node.children)]
    return "\n".join(lines) + "\n"

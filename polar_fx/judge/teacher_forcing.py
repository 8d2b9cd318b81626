"""Verdicts by teacher forcing: one pass over prompt and answer instead of a generation, and no step
run twice.

Greedy decoding gives an answer exactly when, with the answer's tokens fed in, each of them (and the
stop) is the argmax of the logits before it. Three things are shared:

- programs that begin with the same steps share the hidden states after them (`StepTrie`);
- questions of one prompt share its constant prefix: its tokens run once per step, their KV serves
every question; and the choices of a question share the question in the same way;
- at each step the rows, whatever their question and program, that need the same layer next run as
one batch.

Shape legend: B batch, T tokens, P prefix tokens, A answer tokens, d hidden size, H KV heads, L KV
length, E head size, V vocabulary.
"""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.base import Region, RegionName, ShapeClass
from ..capture.support import without_autocast
from ..compiled import CompiledModel
from ..errors import InputError, KvOverflowError
from ..library.steps import HIDDEN, Blends, side_values
from ..program import Program
from ..questions.question import ChoiceKey, EncodedQuestion
from ..runtime.on_device import on_device
from ..runtime.token_rows import padded, padded_tokens
from .scratch_slots import Found, ScratchSlots
from .step_trie import State, StepNode, StepTrie
from .verdict import Verdict, choice_verdict

_MAX_SIDES = 256
_WORTH_A_CALL = 6  # rows; with fewer, padding costs less than another call


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """Tokens run together: a prompt's prefix, or a question's own tokens and one of its answers
    after that prefix. Of a question with choices the whole prompt but its last token is the prefix.
    """

    name: Hashable
    ids: Tensor  # i64[T]
    prefix: "_Row | None" = None
    target: Tensor | None = None  # i64[A], the answer and the stop; or the scored end of a choice

    @property
    def start(self) -> int:
        return len(self.prefix.ids) if self.prefix else 0

    @property
    def tokens(self) -> slice:
        """Their columns in a slot."""
        return slice(self.start, self.start + len(self.ids))


_Task = tuple[_Row, StepNode]
_Pairs = Sequence[tuple[EncodedQuestion, Program]]


class TeacherForcing:
    """Judges (question, program) pairs on a compiled model.

    Args:
        compiled: its regions run the layers; its `max_length` bounds prompt and answer.
        deterministic: run every row alone, so that a verdict has the same bits whatever is judged
            beside it.
        max_rows, max_tokens: of one batch.
        cache_bytes: what hidden states and KV kept for later programs may take.
        share: keep states for later programs at all; only benchmarks turn it off.

    `steps_run` counts executed (row, step) pairs, `steps_asked` those that running each pair by
    itself would have needed.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        *,
        deterministic: bool = False,
        max_rows: int = 64,
        max_tokens: int = 1024,
        cache_bytes: int = 2 << 30,
        share: bool = True,
    ) -> None:
        self.compiled, self.deterministic = compiled, deterministic
        self.max_rows, self.max_tokens = (
            (1, max_tokens) if deterministic else (max_rows, max_tokens)
        )
        self.trie = StepTrie(cache_bytes if share else 0)
        self.steps_run = self.steps_asked = 0
        self._rows: dict[str, tuple[EncodedQuestion, tuple[_Row, ...]]] = {}
        self._prefixes: dict[tuple[int, ...], _Row] = {}
        self._sides: OrderedDict[tuple[_Row, ...], list[Tensor]] = OrderedDict()
        self._slots = ScratchSlots(
            compiled.library.table, compiled.pool.length, device=compiled.device
        )

    # -------------------------------------------------------------------------------------- judging

    @torch.no_grad()
    def evaluate(self, pairs: _Pairs) -> list[Verdict]:
        """A verdict a pair, in order.

        Raises InputError, KvOverflowError, ProgramError or WeightsReplacedError before anything
        runs.
        """
        return self._in_parts(pairs, self._score)

    def choice_scores(self, pairs: _Pairs) -> list[tuple[float, ...]]:
        """Of each pair the score of every choice, by which the answer is chosen without a key: its
        log-likelihood in nats, divided by what the prompt says.

        Raises as `evaluate`, and InputError for a question without choices.
        """
        scores: list[tuple[float, ...]] = []
        for (question, _), each in zip(pairs, self.choice_ends(pairs), strict=True):
            scores.append(question.require_choice().scores([likelihood for _, likelihood in each]))
        return scores

    @torch.no_grad()
    def choice_ends(self, pairs: _Pairs) -> list[list[tuple[bool, float]]]:
        """Of each pair and of every choice whether greedy decoding gives its scored end, and the
        log-likelihood of that in nats. Raises as `choice_scores`.
        """
        for question, _ in pairs:
            question.require_choice()
        found: list[list[tuple[bool, float]]] = []
        for each in self._in_parts(pairs, self._targets):
            found.append([(greedy, likelihood) for greedy, likelihood, _ in each])
        return found

    def _in_parts(self, pairs: _Pairs, score: Callable[[_Pairs], list[Any]]) -> list[Any]:
        """What `score` makes of the pairs, in their order; of so many at a time as memory holds."""
        if (bound := self.compiled.bound) is not None:
            bound.check()
        for question, program in pairs:
            self.compiled.library.check(program)
            self._rows_of(question)
        found: dict[int, Any] = {}
        # neighbors in this order share most steps, so little is held at a time
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][1].path)
        with without_autocast(self.compiled.device):
            for start in range(0, len(order), 4 * self.max_rows):
                chosen = order[start : start + 4 * self.max_rows]
                scored = score([(pairs[i][0], pairs[i][1]) for i in chosen])
                found |= dict(zip(chosen, scored, strict=True))
                self.trie.shrink()
        return [found[i] for i in range(len(pairs))]

    def forget(self, question_ids: Iterable[str]) -> None:
        """Drop what is kept for these questions; prefixes stay."""
        rows: set[_Row] = set()
        for name in question_ids:
            question, own = self._rows.pop(name, (None, ()))
            rows.update(own)
            if question is not None and question.choice is not None:
                rows.update(row.prefix for row in own if row.prefix is not None)
        self.trie.forget(rows)
        for key in [k for k in self._sides if not rows.isdisjoint(k)]:
            del self._sides[key]

    def _rows_of(self, question: EncodedQuestion) -> tuple[_Row, ...]:
        known = self._rows.get(question.id)
        if known is None or known[0] != question:
            if known is not None:
                self.forget([question.id])
            known = self._rows[question.id] = (question, self._new_rows(question))
        return known[1]

    def _new_rows(self, question: EncodedQuestion) -> tuple[_Row, ...]:
        if not question.prompt or not question.targets or not all(question.targets):
            raise InputError(
                f"question {question.id!r} has an empty prompt or answer; encode it with a template"
            )
        longest = len(question.prefix) + len(question.prompt) + max(map(len, question.targets)) - 1
        if longest > self.compiled.pool.max_length:
            raise KvOverflowError(
                f"question {question.id!r} and its answer take {longest} tokens but the model was "
                f"compiled for {self.compiled.pool.max_length}; compile with max_length={longest} "
                "or more"
            )
        switch = self.compiled.runner.switch
        if switch is not None and longest > switch:
            raise InputError(
                f"question {question.id!r} and its answer take {longest} tokens, and past {switch} "
                "this model computes a whole row with other rotary frequencies (longrope), so "
                "that its prefix cannot be shared; shorten it, or judge it by generation"
            )
        tokens = (
            *question.prefix,
            *question.prompt,
            *(t for target in question.targets for t in target),
        )
        if not 0 <= min(tokens) <= max(tokens) < self.compiled.vocab_size:
            raise InputError(
                f"question {question.id!r} holds token ids outside the vocabulary "
                f"0..{self.compiled.vocab_size - 1}"
            )
        if question.choice is not None:
            return self._choice_rows(question, question.choice)
        prefix = None
        if question.prefix:
            if question.prefix not in self._prefixes:
                self._prefixes[question.prefix] = _Row(
                    f"prefix {len(self._prefixes)}", self._tensor(question.prefix)
                )
            prefix = self._prefixes[question.prefix]
        return tuple(
            _Row(
                (question.id, i),
                self._tensor((*question.prompt, *target[:-1])),
                prefix,
                self._tensor(target),
            )
            for i, target in enumerate(question.targets)
        )

    def _choice_rows(self, question: EncodedQuestion, key: ChoiceKey) -> tuple[_Row, ...]:
        """A row a choice; they begin with the prompt's last token, whose logits tell the next."""
        *shared, last = *question.prefix, *question.prompt
        prefix = _Row((question.id, "prompt"), self._tensor(shared)) if shared else None
        return tuple(
            _Row(
                (question.id, i),
                self._tensor((last, *target[:-1])),
                prefix,
                self._tensor(target[-scored:]),
            )
            for i, (target, scored) in enumerate(zip(question.targets, key.scored, strict=True))
        )

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=self.compiled.device)

    def _score(self, pairs: _Pairs) -> list[Verdict]:
        verdicts = []
        for (question, _), found in zip(pairs, self._targets(pairs), strict=True):
            if question.choice is not None:
                scores = question.choice.scores([likelihood for _, likelihood, _ in found])
                verdicts.append(choice_verdict(scores, question.choice.right))
                continue
            best = max(found, key=lambda s: (s[0], -math.inf if math.isnan(s[1]) else s[1]))
            verdicts.append(Verdict(*best))
        return verdicts

    def _targets(self, pairs: _Pairs) -> list[list[tuple[bool, float, float]]]:
        """Of each pair what `_heads` tells of each target."""
        ends = [(self._rows_of(q), self.trie.leaf(p)) for q, p in pairs]
        self.steps_asked += sum(
            len(rows) * p.num_steps for (rows, _), (_, p) in zip(ends, pairs, strict=True)
        )
        tasks = list(dict.fromkeys((row, leaf) for rows, leaf in ends for row in rows))
        self._run(tasks)
        scores: dict[_Task, tuple[bool, float, float]] = {}
        for batch in self._batches(tasks, lambda row: len(row.target)):  # type: ignore[arg-type]
            scores |= dict(zip(batch, self._heads(batch), strict=True))
        found = []
        for rows, leaf in ends:
            found.append([scores[row, leaf] for row in rows])
        return found

    # -------------------------------------------------------------------------------- running steps

    def _run(self, tasks: Sequence[_Task]) -> None:
        """Bring the rows to their nodes: run every step on the way that is not known yet, by layer,
        most rows first.
        """
        waiting: dict[_Task, int] = {}
        followers: dict[_Task, list[_Task]] = defaultdict(list)
        for row, leaf in tasks:
            for task in self._missing(row, leaf, planned=waiting):
                needs = [(row, task[1].parent), *([(row.prefix, task[1])] if row.prefix else [])]
                if row.prefix:
                    for other in self._missing(row.prefix, task[1], planned=waiting):
                        before = (row.prefix, other[1].parent)
                        waiting[other] = int(before in waiting)
                        followers[before].append(other)  # type: ignore[index]
                waiting[task] = sum(n in waiting for n in needs)
                for need in needs:
                    followers[need].append(task)  # type: ignore[index]
        # by layer; prefixes, which are longer, apart from what goes on from them
        ready: dict[tuple[int, bool], list[_Task]] = defaultdict(list)
        for task, count in waiting.items():
            if not count:
                ready[task[1].layer, task[0].target is None].append(task)
        while ready:
            # the fullest batch first; early layers before late ones, so that the rows behind catch
            # up
            key = max(ready, key=lambda k: (len(ready[k]), -k[0]))
            for batch in self._batches(ready.pop(key), lambda row: len(row.ids)):
                self._step(batch)
                for task in batch:
                    for follower in followers.pop(task, ()):
                        waiting[follower] -= 1
                        if not waiting[follower]:
                            ready[follower[1].layer, follower[0].target is None].append(follower)

    def _missing(self, row: _Row, leaf: StepNode, *, planned: dict[_Task, int]) -> list[_Task]:
        """The steps above `leaf` whose states of `row` are neither known nor planned, first one
        first.
        """
        found: list[_Task] = []
        for node in leaf.upwards():
            if row in node.states:
                self.trie.touch(node, row)
                break
            if (row, node) in planned:
                break
            found.append((row, node))
        return found[::-1]

    def _batches(self, tasks: list[_Task], size: Callable[[_Row], int]) -> Iterator[list[_Task]]:
        """Slices of at most `max_rows` rows and `max_tokens` tokens, padding counted."""
        batch: list[_Task] = []
        for task in sorted(tasks, key=lambda t: size(t[0])):
            length = size(task[0])
            full = len(batch) >= self.max_rows or (len(batch) + 1) * length > self.max_tokens
            # where enough rows are of one length, they go without padding
            if batch and (full or (len(batch) >= _WORTH_A_CALL and size(batch[-1][0]) < length)):
                yield batch
                batch = []
            batch.append(task)
        if batch:
            yield batch

    def _step(self, batch: list[_Task]) -> None:
        """One layer for rows that stand before it; each node must be one of that layer's."""
        layer = batch[0][1].layer
        rows = tuple(row for row, _ in batch)
        self.steps_run += len(rows)
        before = [self._state(row, node.parent) for row, node in batch]
        values, tokens = self._inputs(rows)
        call = self.compiled.library.layers[layer]
        found = [self._found(task, state) for task, state in zip(batch, before, strict=True)]
        slot = self._slots.filled(layer, found)
        step = call.step(self._region(call.target, len(rows), tokens=tokens))
        hidden = padded([s.hidden for s in before], tokens)
        out = step.run(hidden, values, slot=slot)
        for i, ((row, node), state) in enumerate(zip(batch, before, strict=True)):
            blends = Blends(torch.lerp, state.saved)
            blends.open(state.hidden, node.opens)
            after = blends.close(out[i, : len(row.ids)], node.closes)
            kv, read = None, state.read
            if row.target is None or layer in self._slots.owners:
                own = [part[i] for part in slot]
                kv = self._slots.kept(layer, row.tokens, slot=own)
            if layer in self._slots.owners and kv is not None:
                read = {**read, layer: kv}
            # a clone: a view would keep the whole batch
            self.trie.put(node, row, state=State(after.clone(), tuple(blends.saved), kv, read))  # type: ignore[arg-type]

    def _state(self, row: _Row, node: StepNode | None) -> State:
        assert node is not None
        if node.parent is not None:
            return node.states[row]
        return State(self._inputs((row,))[0][HIDDEN][0, : len(row.ids)])

    def _found(self, task: _Task, state: State) -> Found:
        """What the step of a row finds in its slot, after the state before it."""
        row, node = task
        owner, prefix = self.compiled.library.table.owners.get(node.layer), ()
        if row.prefix:
            left = node.states[row.prefix]
            prefix = (left.kv or ()) if owner is None else left.read[owner]
        return Found(row.tokens, prefix, () if owner is None else state.read[owner])

    def _inputs(self, rows: tuple[_Row, ...]) -> tuple[list[Tensor], int]:
        """Side values of a batch, the hidden state after the embedding among them, and its padded
        tokens.
        """
        tokens = max(2, *(len(r.ids) for r in rows))
        if rows not in self._sides:
            own = [r.ids for r in rows]
            ids = padded_tokens(own, own, tokens=tokens)
            self._sides[rows] = self._prologue(
                ids, torch.stack([self._positions(r, tokens) for r in rows])
            )
            if len(self._sides) > _MAX_SIDES:
                self._sides.popitem(last=False)
        self._sides.move_to_end(rows)
        return self._sides[rows], tokens

    def _prologue(self, ids: Tensor, positions: Tensor) -> list[Tensor]:
        inputs = [ids, positions, self.compiled.pool.kv_index]
        start = self.compiled.library.prologue
        region = self._region(start.target, len(ids), tokens=ids.shape[1])
        return side_values(region, inputs, weights=start.weights)

    def _positions(self, row: _Row, tokens: int) -> Tensor:
        # padding goes to the spare last column, as in a ragged batch of KvSession
        places = torch.full((tokens,), self.compiled.pool.length - 1, device=self.compiled.device)
        places[: len(row.ids)] = torch.arange(
            row.start, row.start + len(row.ids), device=self.compiled.device
        )
        return places

    def _region(self, target: str, batch: int, *, tokens: int) -> Region:
        shape = ShapeClass.of(batch, tokens, self.compiled.pool.length)
        return self.compiled.regions.one(RegionName(target, shape))

    # ------------------------------------------------------------------------------------- the head

    def _heads(self, batch: list[_Task]) -> list[tuple[bool, float, float]]:
        """Per row: whether every target token is the argmax, their log-probability, their smallest
        lead in logits.
        """
        counts = [len(row.target) for row, _ in batch if row.target is not None]
        count = max(2, *counts)
        ids, positions, hidden, gold = [], [], [], []
        for row, node in batch:
            target = row.target
            assert target is not None
            # what decides: logits of the prompt's last token and of the answer's, but the stop
            where = torch.arange(len(row.ids) - len(target), len(row.ids), device=target.device)
            where = torch.nn.functional.pad(where, (0, count - len(target)), value=len(row.ids) - 1)
            ids.append(row.ids[where])
            positions.append(where + row.start)
            hidden.append(node.states[row].hidden[where])
            gold.append(torch.nn.functional.pad(target, (0, count - len(target))))
        values = self._prologue(torch.stack(ids), torch.stack(positions))
        head = self.compiled.library.epilogue
        step = head.step(self._region(head.target, len(batch), tokens=count))
        logits = step.run(torch.stack(hidden), values).float()
        wanted = torch.stack(gold)[..., None]
        chosen = logits.gather(-1, wanted)
        log_likelihood = (chosen - logits.logsumexp(-1, keepdim=True))[..., 0]
        others, place = logits.scatter_(-1, wanted, -torch.inf).max(-1, keepdim=True)
        margin = (chosen - others)[..., 0]
        # greedy decoding takes the first of equals
        right = (margin > 0) | ((margin == 0) & (wanted < place)[..., 0])
        ends = on_device(counts, right.device)[:, None]
        beyond = torch.arange(count, device=right.device) >= ends
        found = (
            right.masked_fill(beyond, True).all(-1).double(),
            log_likelihood.double().masked_fill(beyond, 0).sum(-1),
            margin.masked_fill(beyond, torch.inf).amin(-1).double(),
        )
        # read once: each number read by itself would wait for the device
        return [
            (bool(sure), likelihood, lead)
            for sure, likelihood, lead in torch.stack(found, -1).tolist()
        ]

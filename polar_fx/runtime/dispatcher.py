"""Dispatch: each row of a batch to its program, on regions that are compiled already.

The steps that all programs share run once, the predictor looks at the hidden states after them,
and each row goes on from there with its own program, in one batch. Shape legend: B batch, T tokens.
"""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import InputError, ProgramError
from ..output.markup import Markup, escaped, html_table
from ..predictor.features import Features
from ..predictor.menu import Menu, Proposal
from ..predictor.policy import Calibration, Policy
from ..program import Program
from .generator import Generator
from .runner import Runner
from .trunk import run_trunk, shares_trunk

log = logging.getLogger("polar_fx.dispatch")

_COST_TOKENS, _COST_ROUNDS = 128, 3

Unprepared = Literal["identity", "link"]


class Predictor(Protocol):
    """Proposes programs for an input."""

    features: Features
    calibration: Calibration

    @property
    def depth(self) -> int: ...

    def propose(self, hidden: Sequence[Tensor]) -> list[Proposal]:
        """A proposal a row, of its hidden states [T, d] after `features.num_steps` steps."""
        ...


@dataclass(frozen=True)
class Decision:
    """What one row runs, and why.

    `probability` is the predicted one of being right, `gain` that over the identity's; both None
    where a prediction was not made or not finite. `reason`: "policy", or why it is the identity
    instead ("not prepared", "not finite").
    """

    program: Program
    probability: float | None = None
    gain: float | None = None
    reason: str = "policy"

    @property
    def num_steps(self) -> int:
        return self.program.num_steps

    def _repr_html_(self) -> str:
        return _decisions_html([self])


@dataclass(frozen=True)
class DispatchReport:
    """What a request did: a decision a row, and seconds of the trunk, of prediction, and of
    everything.
    """

    decisions: tuple[Decision, ...]
    trunk_s: float
    predict_s: float
    total_s: float

    @property
    def groups(self) -> int:
        """How many programs ran."""
        return len({d.program for d in self.decisions})

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [
            {
                "program": str(d.program),
                "steps": d.num_steps,
                "probability": d.probability,
                "gain": d.gain,
                "reason": d.reason,
            }
            for d in self.decisions
        ]
        times = {"trunk_s": self.trunk_s, "predict_s": self.predict_s, "total_s": self.total_s}
        return {"rows": rows, "groups": self.groups, **times}

    def _repr_html_(self) -> str:
        """A row a decision, as notebooks show it."""
        seconds = (self.trunk_s, self.predict_s, self.total_s)
        trunk, predict, total = (f"{1e3 * each:.1f} ms" for each in seconds)
        times = f"{total}, of which the trunk took {trunk} and the prediction {predict}"
        return f"{_decisions_html(self.decisions)}<small>{times}</small>"


def _decisions_html(decisions: Sequence[Decision]) -> Markup:
    def share(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return html_table(
        ("row", "program", "steps", "P(right)", "gain", "reason"),
        [
            (
                row,
                Markup(f"{d.program.strip().svg(ticks=False)}<br>{escaped(d.program.words)}"),
                d.num_steps,
                share(d.probability, ".3f"),
                share(d.gain, "+.3f"),
                d.reason,
            )
            for row, d in enumerate(decisions)
        ],
        right=("row", "steps", "P(right)", "gain"),
    )


class Dispatcher:
    """Chooses programs for a model's inputs.

    Args:
        runner: runs them.
        predictor: proposes them; None proposes the menu without probabilities, which suits policies
            that need none.
        menu: programs prepared by `warmup`; default: the predictor's own.
        policy: chooses among the proposed; its text, or a `Policy`.
        unprepared: what happens to a program that `warmup` did not prepare: "identity" runs that
            instead, "link" runs it all the same, which takes milliseconds and compiles nothing
            where regions are there.

    Raises InputError if the predictor or a program is of another depth, and ProgramError if a
    program does not begin with the steps whose output the predictor reads, or skips a layer whose
    keys and values a later one reads.
    """

    def __init__(
        self,
        runner: Runner,
        predictor: Predictor | None,
        *,
        menu: Menu | None,
        policy: str | Policy,
        unprepared: Unprepared = "identity",
    ) -> None:
        self.runner, self.predictor = runner, predictor
        self.generator = Generator(runner)
        self.unprepared: Unprepared = unprepared
        if unprepared not in ("identity", "link"):
            raise InputError(f"unprepared is {unprepared!r}; use 'identity' or 'link'")
        if predictor is not None and predictor.depth != runner.depth:
            raise InputError(
                f"the predictor was trained for {predictor.depth} layers but the model has "
                f"{runner.depth}; train one for it"
            )
        self.menu = menu or getattr(predictor, "menu", None) or Menu.of((), runner.depth)
        if self.menu.depth != runner.depth:
            raise InputError(
                f"the menu has programs of depth {self.menu.depth} but the model has "
                f"{runner.depth} layers"
            )
        self.identity = Program.identity(runner.depth)
        self.policy = Policy.parse(policy, runner.depth)
        if self.policy.program is not None:
            self.menu = Menu.of((*self.menu.programs, self.policy.program))
        if predictor is None and self.policy.kind not in ("identity", "program"):
            raise InputError(
                f"policy {self.policy} needs a predictor; give predictor=, or use 'identity' or a "
                "program"
            )
        self.calibration = predictor.calibration if predictor is not None else Calibration()
        self.num_steps = 0 if predictor is None else predictor.features.num_steps
        for program in self.menu.programs:
            runner.library.check(program)
            if predictor is not None and not shares_trunk(program, self.num_steps):
                raise ProgramError(
                    f"program {program} does not begin with the {self.num_steps} steps whose "
                    "output the predictor reads; leave it off the menu, or train a predictor with "
                    "fewer shared steps"
                )
        own = getattr(predictor, "menu", None)
        self._on = frozenset(self.menu.programs)
        self._restricted = own is not None and not self._on.issuperset(own.programs)
        self.costs_ms: dict[Program, float] = {}
        self._prepared = {self.identity}
        if self.policy.kind != "latency_ms":
            self.policy.check(self.calibration, self.costs_ms)

    @property
    def prepared(self) -> frozenset[Program]:
        """The programs that a request may run; the identity always may."""
        return frozenset(self._prepared)

    def warmup(self, batches: Sequence[int] = (1, 2)) -> None:
        """Link every program of the menu, compile what they need for one row and for several;
        measure costs if they count.
        """
        for batch in batches:
            self.runner.warm_up(self.menu.programs, batch)
        if self.policy.kind == "latency_ms":
            self.costs_ms = measure_costs(self.runner, self.menu)
        self.admit()

    def admit(self) -> None:
        """Take the whole menu as prepared: for where every region is there already."""
        self._prepared = {self.identity, *self.menu.programs}

    def with_policy(self, policy: str | Policy) -> "Dispatcher":
        """The same with another policy; what is prepared stays so, and costs that it needs are
        measured.
        """
        other = Dispatcher(
            self.runner, self.predictor, menu=self.menu, policy=policy, unprepared=self.unprepared
        )
        other.costs_ms, other._prepared = self.costs_ms, set(self._prepared)
        if (
            other.policy.kind == "latency_ms"
            and not other.costs_ms
            and other._prepared.issuperset(other.menu.programs)
        ):
            other.costs_ms = measure_costs(self.runner, other.menu)
        other.policy.check(other.calibration, other.costs_ms or None)
        return other

    # ------------------------------------------------------------------------------------- deciding

    def decide(self, hidden: Sequence[Tensor]) -> list[Decision]:
        """A decision a row, of its hidden states [T, d] after `num_steps` steps."""
        if self.predictor is None or not self.needs_trunk:
            wanted = self.policy.program or self.identity
            return [self._allowed(Decision(wanted))] * len(hidden)
        decisions = []
        for proposal in map(self._on_menu, self.predictor.propose(hidden)):
            chosen = self.policy.choose(proposal, self.calibration, costs_ms=self.costs_ms)
            chance, base = float(proposal.probabilities[chosen]), float(proposal.probabilities[0])
            if chance != chance or base != base:  # NaN features: nothing is known about this input
                decisions.append(Decision(self.identity, reason="not finite"))
                continue
            decisions.append(
                self._allowed(Decision(proposal.programs[chosen], chance, chance - base))
            )
        return decisions

    def _on_menu(self, proposal: Proposal) -> Proposal:
        """The proposal without programs that are not on the menu; of predictors with a menu of
        their own alone.
        """
        if not self._restricted:
            return proposal
        kept = [i for i, p in enumerate(proposal.programs) if p in self._on]
        programs = [proposal.programs[i] for i in kept]
        return replace(
            proposal,
            programs=programs,
            steps=proposal.steps[kept],
            probabilities=proposal.probabilities[kept],
        )

    def choose(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Decision]:
        """What each row of i64[B, T] would run; only the shared steps run.

        Raises what `forward` raises.
        """
        rows, _ = self.runner.rows(input_ids, attention_mask)
        if not self.needs_trunk:
            return self.decide([torch.empty(0)] * len(rows))
        with run_trunk(self.runner, rows, num_steps=self.num_steps) as trunk:
            return self.decide(trunk.hidden)

    @property
    def needs_trunk(self) -> bool:
        """Whether the policy looks at the input at all."""
        return self.predictor is not None and self.policy.kind not in ("identity", "program")

    def _allowed(self, decision: Decision) -> Decision:
        if decision.program in self._prepared or self.unprepared == "link":
            return decision
        return Decision(self.identity, reason="not prepared")

    # ----------------------------------------------------------------------------------- generating

    def generate(self, input_ids: Tensor, **kwargs: Any) -> tuple[Any, DispatchReport]:
        """What `CompiledModel.generate` returns, each row by its own program, rows in order; and
        what was done.

        Shorter continuations are padded as `generate` pads. Raises what `CompiledModel.generate`
        raises, before anything runs.
        """
        if "program" in kwargs:
            raise InputError(
                "a dispatched call chooses the program itself; use generate(program=...) to name "
                "one"
            )
        start = time.perf_counter()
        call = self.generator.check(input_ids, **kwargs)
        if not self.needs_trunk:
            decisions = self.decide([torch.empty(0)] * len(call.rows))
            output = self.generator.run(call, decisions[0].program)
            return output, DispatchReport(tuple(decisions), 0.0, 0.0, time.perf_counter() - start)
        with run_trunk(self.runner, call.rows, num_steps=self.num_steps) as trunk:
            ran = time.perf_counter()
            decisions = self.decide(trunk.hidden)
            decided = time.perf_counter()
            output = self.generator.run(call, [d.program for d in decisions], trunk=trunk)
        report = DispatchReport(
            tuple(decisions), ran - start, decided - ran, time.perf_counter() - start
        )
        log.debug("%d rows by %d programs", len(call.rows), report.groups)
        return output, report


def measure_costs(
    runner: Runner, menu: Menu, *, tokens: int = _COST_TOKENS
) -> dict[Program, float]:
    """Milliseconds of a prefill of `tokens` tokens and one decoding step, by program: the median of
    interleaved runs.
    """
    tokens = max(1, min(tokens, runner.max_length - 1))
    rows = [torch.zeros(tokens, dtype=torch.long)]
    times: dict[Program, list[float]] = {program: [] for program in menu.programs}
    for _ in range(_COST_ROUNDS + 1):
        for program, taken in times.items():
            together = runner.open_together if runner.together else runner.open_rows
            with together([program]) as session:  # as dispatched rows run
                start = time.perf_counter()
                runner.prefill(session, rows)
                runner.decode(session, torch.zeros(1, dtype=torch.long))
                if runner.device.type == "cuda":
                    torch.cuda.synchronize(runner.device)
                taken.append(1e3 * (time.perf_counter() - start))
    return {program: statistics.median(taken[1:]) for program, taken in times.items()}

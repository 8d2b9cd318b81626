"""Dispatch: rows go to the programs chosen for them, on one trunk, in order, and fall back to the
identity.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polar_fx
from polar_fx.compiled import CompiledModel
from polar_fx.errors import InputError, KvOverflowError, ProgramError
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration
from polar_fx.program import Program
from polar_fx.runtime.dispatcher import Dispatcher
from polar_fx.runtime.trunk import run_trunk, session_after, shares_trunk
from tiny_search import peaked

DEPTH = 6
PROGRAMS = [
    Program.parse(text, DEPTH)
    for text in ("skip 3", "repeat 4", "0-1 (2-3)*2@0.5 4-5", "skip 2-4", "0-5 5 4")
]
IDENTITY = Program.identity(DEPTH)


@pytest.fixture(scope="module", params=[False, True], ids=["batched", "deterministic"])
def model(request: pytest.FixtureRequest) -> CompiledModel:
    return polar_fx.compile(
        peaked(), "eager", max_length=47, prefill_chunk=8, deterministic=request.param, cache=False
    )


class ByFirstToken:
    """Proposes the program whose number is the first token, modulo their count; sees it in the
    embedding's hidden state.
    """

    depth = DEPTH
    calibration = Calibration(threshold=0.5)

    def __init__(
        self, model: CompiledModel, num_steps: int = 2, *, programs: Sequence[Program] = PROGRAMS
    ) -> None:
        self.features, self.menu = Features(num_steps, 64), Menu.of(programs)
        self.model, self.asked = model, 0
        with run_trunk(
            model.runner, [torch.tensor([t]) for t in range(40)], num_steps=num_steps
        ) as trunk:
            self.table = torch.stack([h[0] for h in trunk.hidden])

    def propose(self, hidden: Sequence[Tensor]) -> list[Proposal]:
        self.asked += 1
        found = []
        for row in hidden:
            # the first token attends to itself alone, whatever follows
            token = int((self.table - row[0]).norm(dim=1).argmin())
            chances = np.zeros(len(self.menu))
            chances[token % len(self.menu)] = 1.0
            found.append(Proposal(self.menu.programs, self.menu.steps, chances))
        return found

    def of(self, token: int) -> Program:
        return self.menu.programs[token % len(self.menu)]


def _batch(rng: torch.Generator, rows: int, *, longest: int) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(1, longest + 1, (rows,), generator=rng)
    lengths[0] = longest
    ids = torch.randint(0, 40, (rows, longest), generator=rng)
    return ids, (torch.arange(longest) >= longest - lengths[:, None]).long()


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("tokens", [(1,), (2, 1, 5), (9, 17, 8), (16, 20)])
def test_a_trunk_and_what_follows_is_the_whole_program(
    model: CompiledModel, num_steps: int, tokens: tuple[int, ...]
) -> None:
    rng = torch.Generator().manual_seed(sum(tokens))
    rows = [torch.randint(0, 40, (n,), generator=rng) for n in tokens]
    for program in (IDENTITY, *PROGRAMS):
        with model.session(program, len(rows)) as session:
            wanted = model.prefill(program, session, rows)
            then = model.decode(program, session, torch.tensor([7] * len(rows)))
        with run_trunk(model.runner, rows, num_steps=num_steps) as trunk:
            assert [len(h) for h in trunk.hidden] == list(tokens)
            for chosen in (list(range(len(rows))), [len(rows) - 1], [len(rows) - 1, 0, 0]):
                part = trunk.take(chosen)
                with session_after(model.runner, [program] * len(chosen), trunk=part) as session:
                    got = model.prefill(program, session, [rows[i] for i in chosen])
                    after = model.decode(program, session, torch.tensor([7] * len(chosen)))
                for at, i in enumerate(chosen):
                    torch.testing.assert_close(got[at], wanted[i], atol=1e-4, rtol=1e-4)
                    torch.testing.assert_close(after[at], then[i], atol=1e-4, rtol=1e-4)
    for free in model.pool._free.values():
        for slot in free:
            assert not any(bool(part.any()) for part in slot.parts)


def test_rows_run_the_programs_chosen_for_them_in_order(model: CompiledModel) -> None:
    predictor = ByFirstToken(model)
    dispatcher = model.dispatch_by(predictor)
    dispatcher.warmup()
    rng = torch.Generator().manual_seed(1)
    for rows, longest in ((1, 5), (6, 9), (7, 1)):
        ids, mask = _batch(rng, rows, longest=longest)
        options: dict[str, Any] = dict(
            max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        got, report = model.dispatch(ids, attention_mask=mask, **options)
        first = [int(row[m.bool()][0]) for row, m in zip(ids, mask, strict=True)]
        assert [d.program for d in report.decisions] == list(map(predictor.of, first))
        assert report.groups == len({d.program for d in report.decisions})
        for i in range(rows):
            alone = model.generate(
                ids[i : i + 1],
                program=predictor.of(first[i]),
                attention_mask=mask[i : i + 1],
                **options,
            )
            assert torch.equal(got[i], alone[0]), i
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), got)
    assert predictor.asked == 6  # once a batch


def test_beams_and_returned_sequences_stay_in_order(model: CompiledModel) -> None:
    dispatcher = model.dispatch_by(predictor := ByFirstToken(model))
    dispatcher.warmup()
    ids = torch.tensor([[1, 5, 6], [2, 5, 6], [1, 9, 9]])
    options: dict[str, Any] = dict(
        max_new_tokens=3, num_beams=3, num_return_sequences=2, eos_token_id=None, pad_token_id=0
    )
    got = model.generate(ids, **options)
    wanted = [
        model.generate(ids[i : i + 1], program=predictor.of(int(ids[i, 0])), **options)
        for i in range(3)
    ]
    assert torch.equal(got, torch.cat(wanted))


def test_shorter_answers_are_padded_as_generate_pads(model: CompiledModel) -> None:
    model.dispatch_by(predictor := ByFirstToken(model)).warmup()
    ids = torch.tensor([[1, 5, 6], [2, 5, 6]])
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=33)
    free = [
        model.generate(
            ids[i : i + 1], program=predictor.of(int(ids[i, 0])), eos_token_id=None, **options
        )[0]
        for i in (0, 1)
    ]
    end = int(free[0][4])  # the first row's second new token ends it
    got = model.generate(ids, eos_token_id=end, **options)
    stop = (free[0][3:] == end).nonzero()[0].item() + 4
    assert got[0, :stop].tolist() == free[0][:stop].tolist() and set(got[0, stop:].tolist()) <= {33}


def test_what_is_not_prepared_runs_the_identity_unless_told_to_link(model: CompiledModel) -> None:
    ids = torch.tensor([[1, 5, 6]])
    dispatcher = model.dispatch_by(ByFirstToken(model))
    assert dispatcher.prepared == {IDENTITY}
    (decision,) = dispatcher.choose(ids)
    assert decision.program == IDENTITY and decision.reason == "not prepared"
    (decision,) = model.dispatch_by(ByFirstToken(model), unprepared="link").choose(ids)
    assert decision.program == PROGRAMS[0] and decision.gain == 1.0
    dispatcher.warmup()
    compiled = len(model.regions.records)
    model.dispatcher = dispatcher
    model.generate(ids, max_new_tokens=2, pad_token_id=0)
    assert len(model.regions.records) == compiled


def test_hidden_states_that_are_not_finite_run_the_identity(model: CompiledModel) -> None:
    class Broken(ByFirstToken):
        def propose(self, hidden: Sequence[Tensor]) -> list[Proposal]:
            return [
                Proposal(p.programs, p.steps, p.probabilities * np.nan)
                for p in super().propose(hidden)
            ]

    dispatcher = model.dispatch_by(Broken(model))
    dispatcher.warmup()
    (decision,) = dispatcher.choose(torch.tensor([[1, 5, 6]]))
    assert (decision.program, decision.reason, decision.probability) == (
        IDENTITY,
        "not finite",
        None,
    )


@pytest.mark.parametrize("policy", ["identity", "skip 3"])
def test_policies_that_need_no_prediction_make_none(model: CompiledModel, policy: str) -> None:
    dispatcher = model.dispatch_by(predictor := ByFirstToken(model), policy=policy)
    dispatcher.warmup()
    asked = predictor.asked
    ids = torch.tensor([[1, 5, 6], [2, 3, 4]])
    _, report = model.dispatch(ids, max_new_tokens=2, pad_token_id=0)
    program = IDENTITY if policy == "identity" else PROGRAMS[0]
    assert [d.program for d in report.decisions] == [program] * 2 and predictor.asked == asked
    assert report.to_dict()["rows"][0]["steps"] == program.num_steps
    shown = report._repr_html_()
    assert (
        shown.count("<svg") == 2 and f"<br>{program.words}<" in shown and " ms, of which" in shown
    )
    assert report.decisions[0]._repr_html_().count("<svg") == 1
    without = model.dispatch_by(policy=policy)
    without.warmup()
    assert [d.program for d in without.choose(ids)] == [program] * 2


def test_latency_budgets_use_measured_costs(model: CompiledModel) -> None:
    dispatcher = model.dispatch_by(ByFirstToken(model), policy="latency_ms<=1000000")
    dispatcher.warmup()
    assert (
        set(dispatcher.costs_ms) == {IDENTITY, *PROGRAMS} and min(dispatcher.costs_ms.values()) > 0
    )
    assert dispatcher.choose(torch.tensor([[1, 5]]))[0].program == PROGRAMS[0]
    tight = dispatcher.with_policy("latency_ms<=1e-9")
    assert tight.choose(torch.tensor([[1, 5]]))[0].program == IDENTITY
    with pytest.raises(InputError, match="warmup"):
        model.dispatch_by(ByFirstToken(model)).with_policy("latency_ms<=5")
    other = model.dispatch_by(ByFirstToken(model))
    other.warmup()
    assert (
        other.with_policy("latency_ms<=1000000").choose(torch.tensor([[1, 5]]))[0].program
        == PROGRAMS[0]
    )


def test_callbacks_meet_the_rows_they_were_given_for(model: CompiledModel) -> None:
    model.dispatch_by(ByFirstToken(model)).warmup()
    ids = torch.tensor([[1, 5], [2, 5], [1, 9], [3, 3]])
    options: dict[str, Any] = dict(max_new_tokens=2, pad_token_id=0, eos_token_id=None)
    got = model.generate(ids, prefix_allowed_tokens_fn=lambda row, _: [30 + row], **options)
    assert got[:, 2:].tolist() == [[30 + row] * 2 for row in range(4)]


def test_what_looks_at_all_rows_sees_rows_of_all_programs(model: CompiledModel) -> None:
    dispatcher = model.dispatch_by(ByFirstToken(model))
    dispatcher.warmup()
    ids = torch.tensor([[1, 5], [2, 5], [3, 3]])
    options: dict[str, Any] = dict(max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    programs = [d.program for d in dispatcher.choose(ids)]
    assert len(set(programs)) == 3
    seen: list[tuple[int, ...]] = []

    def watch(tokens: Tensor, scores: Tensor) -> Tensor:
        seen.append(tuple(tokens.shape))
        return scores

    out, report = dispatcher.generate(
        ids, logits_processor=[watch], return_dict_in_generate=True, output_logits=True, **options
    )
    assert seen == [(3, 2), (3, 3), (3, 4)] and report.groups == 3
    for row, program in enumerate(programs):
        alone = model.generate(
            ids[row : row + 1],
            program=program,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        assert torch.equal(out.sequences[row], alone.sequences[0])
        torch.testing.assert_close(
            torch.stack(out.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-4, rtol=1e-4
        )


def test_a_smaller_menu_is_what_the_policy_chooses_from(model: CompiledModel) -> None:
    class Graded(ByFirstToken):
        def propose(self, hidden: Sequence[Tensor]) -> list[Proposal]:
            chances = np.linspace(0.1, 0.9, len(self.menu))
            return [Proposal(self.menu.programs, self.menu.steps, chances) for _ in hidden]

    Graded.calibration = Calibration(0.0)
    ids = torch.tensor([[1, 5]])
    for menu, best in ((None, PROGRAMS[-1]), (PROGRAMS[:2], PROGRAMS[1])):
        dispatcher = model.dispatch_by(Graded(model), menu=menu)
        dispatcher.warmup()
        assert dispatcher.choose(ids)[0].program == best


def test_refusals_name_value_and_remedy(model: CompiledModel) -> None:
    with pytest.raises(ProgramError, match="does not begin with the 2 steps"):
        model.dispatch_by(ByFirstToken(model, 2, programs=PROGRAMS), menu=["skip 0"])
    with pytest.raises(InputError, match="needs a predictor"):
        model.dispatch_by(policy="accuracy")
    with pytest.raises(InputError, match="unprepared is 'compile'"):
        model.dispatch_by(policy="identity", unprepared="compile")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="depth 5 but the model has 6"):
        model.dispatch_by(policy="identity", menu=Menu.of([Program.parse("skip 1", 5)]))
    other = ByFirstToken(model)
    other.depth = 7
    with pytest.raises(InputError, match="trained for 7 layers but the model has 6"):
        Dispatcher(model.runner, other, menu=None, policy="accuracy")
    dispatcher = model.dispatch_by(ByFirstToken(model))
    dispatcher.warmup()
    with pytest.raises(InputError, match="at least one token"):
        model.generate(torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(KvOverflowError):
        model.generate(torch.zeros(1, 40, dtype=torch.long), max_new_tokens=20)
    two, more = torch.tensor([[1, 5], [2, 5]]), dict(max_new_tokens=2, pad_token_id=0)
    with pytest.raises(InputError, match="chooses the program itself"):
        dispatcher.generate(two, program="identity", **more)
    model.dispatcher = None
    with pytest.raises(InputError, match="nothing is dispatched"):
        model.dispatch(torch.tensor([[1]]))


def test_which_programs_share_a_trunk() -> None:
    cases = {
        "skip 3": 3,
        "repeat 4": 5,
        "0-1 (2-3)*2@0.5 4-5": 4,
        "skip 0": 0,
        "[0-2]@0.5 4": 0,
        "0 0 1-5": 1,
    }
    for text, most in cases.items():
        program = Program.parse(text, DEPTH)
        shared = [n for n in range(DEPTH + 1) if shares_trunk(program, n)]
        assert shared == list(range(most + 1)), text
    assert not shares_trunk(IDENTITY, DEPTH)

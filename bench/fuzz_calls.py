"""The random calls of the fuzz: each uses a compiled model in one of the ways in which users do.

It tells how far the result was from a plain loop, as a part of what is allowed: 1 is the limit.

Shape legend: T tokens, V vocabulary.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plain_loop import plain_logits
from polar_fx.capture.rotary import frequency_switch
from polar_fx.compiled import CompiledModel
from polar_fx.engine import Sampling
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu, Proposal
from polar_fx.predictor.policy import Calibration
from polar_fx.program import Program
from polar_fx.runtime.generator import padded_rows

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
# of the largest logit, beside what the plain loop itself loses
_FLOOR = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
_TIMES = 6.0
_GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def random_text(rng: random.Random, depth: int) -> str:
    """Runs of layers, skipped, repeated and damped in one another."""
    text = ""
    for _ in range(rng.randint(1, 3)):
        part = " ".join(str(rng.randrange(depth)) for _ in range(rng.randint(1, 3)))
        damping = rng.choice(("0.25", "0.5", "0.9"))
        forms = (part, part, f"({part})*2", f"({part})*2@{damping}", f"[{part}]@{damping}")
        text += f" {rng.choice(forms)}"
    return f"0 ({text})*2@0.5" if rng.random() < 0.2 else text


def random_program(rng: random.Random, depth: int) -> Program:
    """A program, now and then the identity."""
    text = random_text(rng, depth)
    return Program.parse(text if rng.random() < 0.9 else "identity", depth)


class Judge:
    """Compares with the plain loop in a wider type, beside what it loses in the model's own."""

    def __init__(self, model: PreTrainedModel, experts: bool = False) -> None:
        dtype: torch.dtype = model.dtype
        self.model, self.floor = model, _FLOOR[dtype]
        self.by_length = frequency_switch(model.config) is not None
        self.wider: Any = copy.deepcopy(model)
        if not experts:  # torch multiplies none in float64
            self.wider.to(WIDER[dtype])

    def logits(self, program: Program, row: Tensor) -> tuple[Tensor, Tensor]:
        """The wanted logits [T, V] in the wider type, and how far they may be missed."""
        want = plain_logits(self.wider, program, row=row)
        lost = (plain_logits(self.model, program, row=row).to(want) - want).abs().max()
        return want, self.floor * want.abs().max() + _TIMES * lost

    def of_logits(self, program: Program, row: Tensor, got: Tensor) -> float:
        """Of the logits [n, V] of the last n tokens of a row."""
        want, allowed = self.logits(program, row)
        missed = (got.to(want) - want[len(want) - len(got) :]).abs().max()
        return float((missed / allowed).nan_to_num(torch.inf))

    def of_tokens(self, program: Program, row: Tensor, new: Sequence[int]) -> float:
        """Each greedy token has to be the likeliest, or within what is allowed of it twice."""
        if not len(new):
            return 0.0
        whole = torch.cat((row, torch.tensor(new)))
        if self.by_length and len(new) > 1:  # each token was chosen at the length it had then
            parts = [whole[: len(row) + n] for n in range(len(new))]
            return max(self.of_tokens(program, p, new=[t]) for p, t in zip(parts, new, strict=True))
        want, allowed = self.logits(program, whole[:-1])
        ahead = want[len(row) - 1 :]
        short = ahead.amax(-1) - ahead.gather(-1, torch.tensor(new)[:, None])[:, 0]
        return float((short.max() / (2 * allowed)).nan_to_num(torch.inf))

    def of_score(self, program: Program, row: Tensor, new: Sequence[int], score: float) -> float:
        """The sum of log-probabilities of a row's new tokens."""
        whole, total, most = torch.cat((row, torch.tensor(new))), 0.0, 0.0
        # of a model that goes by the length, each token has the one it was chosen at
        ends = range(len(row), len(whole)) if self.by_length else (len(whole) - 1,)
        for end in ends:
            want, allowed = self.logits(program, whole[:end])
            first = end if self.by_length else len(row)
            chances = want[first - 1 :].log_softmax(-1)
            total += float(chances.gather(-1, whole[first : end + 1, None]).sum())
            most += 2 * float(allowed) * (end + 1 - first)
        return abs(score - total) / most if math.isfinite(score) else math.inf


@dataclass(frozen=True, eq=False)
class Setting:
    """What a random call needs: no row of it may come to hold more than `most` tokens."""

    compiled: CompiledModel
    judge: Judge
    rng: random.Random
    most: int

    @property
    def depth(self) -> int:
        return self.compiled.depth

    def tokens(self, count: int) -> Tensor:
        """Random token ids i64[T]; none is a pad token."""
        drawn = [self.rng.randrange(3, 100) for _ in range(count)]
        return torch.tensor(drawn, dtype=torch.long)

    def program(self) -> Program:
        return random_program(self.rng, self.depth)

    def rows(self, count: int, new: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Ragged rows with room for `new` tokens, and the same padded on some side, with a mask."""
        rows = [self.tokens(self.rng.randint(1, self.most - new)) for _ in range(count)]
        side = self.rng.choice(("left", "right"))
        return rows, *padded_rows([row.tolist() for row in rows], side=side)

    def programs(self, count: int) -> list[Program]:
        """One for each row, which are the same more often than not."""
        mixed = self.rng.random() < 0.4
        return [self.program() for _ in range(count)] if mixed else [self.program()] * count


@dataclass(frozen=True)
class Found:
    """How a call was judged, and what was asked."""

    worst: float
    asked: dict[str, Any]


def forward(setting: Setting) -> Found:
    """Logits of every token of ragged rows."""
    count = setting.rng.randint(1, 4)
    rows, ids, mask = setting.rows(count, 0)
    programs = setting.programs(count)
    got = setting.compiled.forward(ids, mask, program=programs)
    found = [own[real.bool()] for own, real in zip(got, mask, strict=True)]
    worst = max(map(setting.judge.of_logits, programs, rows, found))
    return Found(worst, _asked(rows, programs))


def generate(setting: Setting) -> Found:
    """Greedy tokens of ragged rows."""
    count, new = setting.rng.randint(1, 4), setting.rng.randint(1, 8)
    rows, ids, mask = setting.rows(count, new)
    programs = setting.programs(count)
    out = setting.compiled.generate(
        ids, program=programs, attention_mask=mask, max_new_tokens=new, **_GREEDY
    )
    worst = max(map(setting.judge.of_tokens, programs, rows, out[:, ids.shape[1] :].tolist()))
    return Found(worst, _asked(rows, programs, new=new))


def beams(setting: Setting) -> Found:
    """Beam search: what it says of its sequences has to be their probability."""
    count, new = setting.rng.randint(1, 3), setting.rng.randint(1, 5)
    rows, ids, mask = setting.rows(count, new)
    programs = setting.programs(count)
    options: dict[str, Any] = dict(num_beams=setting.rng.randint(2, 3), length_penalty=0.0)
    out = setting.compiled.generate(
        ids,
        program=programs,
        attention_mask=mask,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
        **_GREEDY,
    )
    new_tokens, scores = out.sequences[:, ids.shape[1] :].tolist(), out.sequences_scores.tolist()
    worst = max(map(setting.judge.of_score, programs, rows, new_tokens, scores))
    return Found(worst, {**_asked(rows, programs, new=new), **options})


class _Drawing:
    """A predictor that knows nothing: it draws which program of its menu is the best."""

    def __init__(self, rng: random.Random, menu: Menu, *, num_steps: int, size: int) -> None:
        self.rng, self.menu, self.depth = rng, menu, menu.depth
        self.features, self.calibration = Features(num_steps, size), Calibration(threshold=0.5)

    def propose(self, hidden: Sequence[Tensor]) -> list[Proposal]:
        found = []
        for _ in hidden:
            chances = np.zeros(len(self.menu))
            chances[self.rng.randrange(len(self.menu))] = 1.0
            found.append(Proposal(self.menu.programs, self.menu.steps, chances))
        return found


def dispatch(setting: Setting) -> Found:
    """Shared steps, and then a program for each row."""
    compiled, rng = setting.compiled, setting.rng
    predictor = _drawing(setting)
    compiled.dispatch_by(predictor, unprepared="link")
    count, new = rng.randint(1, 4), rng.randint(1, 8)
    rows, ids, mask = setting.rows(count, new)
    out, report = compiled.dispatch(ids, attention_mask=mask, max_new_tokens=new, **_GREEDY)
    compiled.dispatcher = None
    programs = [decision.program for decision in report.decisions]
    worst = max(map(setting.judge.of_tokens, programs, rows, out[:, ids.shape[1] :].tolist()))
    return Found(worst, {**_asked(rows, programs, new=new), "shared": predictor.features.num_steps})


def _drawing(setting: Setting) -> _Drawing:
    shared = setting.rng.randint(0, setting.depth - 1)
    first = " ".join(map(str, range(shared)))
    programs = [
        Program.parse(f"{first} {random_text(setting.rng, setting.depth)}", setting.depth)
        for _ in range(3)
    ]
    size = setting.compiled.config.hidden_size
    return _Drawing(setting.rng, Menu.of(programs), num_steps=shared, size=size)


def conversation(setting: Setting) -> Found:
    """Turns, answers, branches and tokens that are taken back, in any order."""
    rng, program = setting.rng, setting.program()
    worst, done = 0.0, []
    talks = [setting.compiled.start(program)]
    for _ in range(rng.randint(3, 10)):
        number = rng.randrange(len(talks))
        talk = talks[number]
        room = setting.most - len(talk)
        acts = ["append", "generate"] * (room > 1) + ["crop", "branch"] * (len(talk) > 0)
        act, count = rng.choice(acts), rng.randint(1, max(1, room - 1))
        if act == "branch":
            talks.append(talk.branch())
        elif act == "crop":
            count = rng.randint(0, len(talk))
            talk.crop(count)
        elif act == "append":
            logits = talk.append(setting.tokens(count))[None]
            worst = max(worst, setting.judge.of_logits(program, _said(talk), got=logits))
        else:
            turn = setting.tokens(0 if len(talk) and rng.random() < 0.3 else count)
            said = torch.cat((_said(talk), turn))
            new = rng.randint(1, min(8, setting.most - len(said)))
            answer = talk.generate(turn, max_new_tokens=new, **_GREEDY)
            worst = max(worst, setting.judge.of_tokens(program, said, new=answer.tolist()))
            count = len(turn)
        done.append(f"{number} {act} {count}: {len(talk)}")
    for talk in talks:
        talk.close()
    _all_given_back(setting)
    return Found(worst, {"programs": [str(program)], "acts": done})


def _said(talk: Any) -> Tensor:
    return torch.tensor(talk.tokens, dtype=torch.long)


def engine(setting: Setting) -> Found:
    """Requests that come and go between tokens, on programs of their own or chosen ones; some are
    cancelled.
    """
    compiled, rng = setting.compiled, setting.rng
    if rng.random() < 0.4:
        compiled.dispatch_by(_drawing(setting), unprepared="link")
    settings = dict(
        max_rows=rng.randint(1, 4),
        max_tokens=rng.choice((1, 2, 4)) * setting.most,
        prefill_tokens=rng.choice((2, 5, 16, 64)),
    )
    engine = compiled.engine(**settings)
    requests, left = [], rng.randint(2, 6)
    while True:
        if left and rng.random() < 0.5:
            new = rng.randint(1, 8)
            prompt = setting.tokens(rng.randint(1, setting.most - new))
            program = None if compiled.dispatcher and rng.random() < 0.5 else setting.program()
            requests.append(engine.add(prompt, program, Sampling(max_new_tokens=new)))
            left -= 1
        if requests and rng.random() < 0.05:
            rng.choice(requests).cancel()
        if not engine.step() and not left:
            break
    engine.close()
    compiled.dispatcher = None
    _all_given_back(setting)
    results = [request.result() for request in requests]
    prompts = [torch.tensor(request.prompt) for request in requests]
    programs = [result.program for result in results]
    tokens = [result.tokens for result in results]
    for request, result in zip(requests, results, strict=True):
        if result.finish != "cancelled" and len(result.tokens) != request.sampling.max_new_tokens:
            raise AssertionError(f"request {request.number} has {len(result.tokens)} tokens")
    worst = max(map(setting.judge.of_tokens, programs, prompts, tokens))
    finishes = [result.finish for result in results]
    return Found(worst, {**_asked(prompts, programs), **settings, "finishes": finishes})


def _all_given_back(setting: Setting) -> None:
    if held := setting.compiled.runner.lockstep.store.num_blocks:
        raise AssertionError(f"{held} blocks of keys and values were not given back")


def _asked(rows: Sequence[Tensor], programs: Sequence[Program], *, new: int = 0) -> dict[str, Any]:
    texts = [str(program) for program in programs]
    return {"lengths": [len(row) for row in rows], "new": new, "programs": texts}


# in lock-step; the last two are refused elsewhere
KINDS: tuple[Callable[[Setting], Found], ...] = (
    forward,
    generate,
    beams,
    dispatch,
    engine,
    conversation,  # in blocks alone
)


def call(setting: Setting) -> dict[str, Any]:
    """One random call as JSON values, and how it was judged."""
    kinds = KINDS if setting.compiled.runner.together else KINDS[:-1]
    kind = setting.rng.choice(kinds)
    found = kind(setting)
    return {"kind": kind.__name__, "worst": found.worst, **found.asked}

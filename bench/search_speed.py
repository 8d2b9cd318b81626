"""Simulations per second: judging programs by `polar_fx` against one batched HF `generate` per
program.

    python bench/search_speed.py                       # both prompts, both patterns
    python bench/search_speed.py --dtype bfloat16

Two patterns of asking. "grid": the programs that one search looked at, on every question; the plain
method can batch all questions of a program. "search": what Monte Carlo tree searches ask for round
after round, a program of its own for almost every question; of each round the plain method judges a
sample, because all would take hours. Contenders take turns within one process; a verdict is whether
greedy decoding gives exactly the gold answer and its stop.
"""

import argparse
import copy
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import polar_fx
from measure import RESULTS, machine, paired_ratio, write_json
from polar_fx.judge.teacher_forcing import TeacherForcing
from polar_fx.program import Program
from polar_fx.questions import EncodedQuestion, PromptTemplate, generate, get_template
from polar_fx.runtime.generator import padded_rows
from polar_fx.search.config import SearchConfig
from polar_fx.search.methods.registry import get_method, question_seed

Pair = tuple[EncodedQuestion, Program]

# Questions, and programs of a grid or of each search; the plain method takes seconds for each where
# answers ramble on.
_SIZES = {
    ("few-shot", "grid"): (32, 16),
    ("few-shot", "search"): (16, 40),
    ("direct", "grid"): (32, 16),
    ("direct", "search"): (16, 12),
}
_SAMPLE = 2  # pairs a round that the plain method judges in the pattern "search"


@contextmanager
def swapped(model: Any, program: Program) -> Iterator[None]:
    """The model with its layers in the program's order, a cache slot a step: what replications
    do.
    """
    stack, config = model.model, model.config
    kept = stack.layers, config.num_hidden_layers
    layers = []
    for step, layer in enumerate(program.path):
        one = copy.copy(kept[0][layer])
        one._modules = dict(one._modules)
        one.self_attn = copy.copy(one.self_attn)
        one.self_attn.layer_idx = step
        layers.append(one)
    stack.layers, config.num_hidden_layers = nn.ModuleList(layers), len(layers)
    try:
        yield
    finally:
        stack.layers, config.num_hidden_layers = kept


class Plain:
    """One HF `generate` a program, batched over the questions that ask for it; ends at the stop, or
    at the prompt's limit.
    """

    def __init__(self, model: Any, tokenizer: Any, *, template: PromptTemplate) -> None:
        self.model, self.pad = model, tokenizer.eos_token_id
        ends = {tokenizer.eos_token_id, *template.decode_stop(tokenizer).token_ids}
        if template.stop:
            ends |= {tokenizer.encode(template.stop, add_special_tokens=False)[-1]}
        self.arguments = {
            "max_new_tokens": template.max_new_tokens,
            "do_sample": False,
            "eos_token_id": sorted(ends),
            "pad_token_id": self.pad,
        }

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> list[bool]:
        groups: dict[Program, list[int]] = defaultdict(list)
        for i, (_, program) in enumerate(pairs):
            groups[program].append(i)
        right = [False] * len(pairs)
        for program, members in groups.items():
            rows = [pairs[i][0].prefix + pairs[i][0].prompt for i in members]
            ids, mask = padded_rows(rows, self.pad)
            with swapped(self.model, program):
                out = self.model.generate(ids, attention_mask=mask, **self.arguments)[
                    :, ids.shape[1] :
                ]
            for i, tokens in zip(members, out.tolist(), strict=True):
                right[i] = any(tuple(tokens[: len(t)]) == t for t in pairs[i][0].targets)
        return right


def searches(
    questions: Sequence[EncodedQuestion], depth: int, forcing: TeacherForcing, rounds: int
) -> list[list[Pair]]:
    """The first rounds of searches in lockstep, one program a question each, judged as they go."""
    config = SearchConfig()
    running = {
        q: get_method("mcts")(depth, config, random.Random(question_seed(0, q.id)))
        for q in questions
    }
    asked = {q: next(s) for q, s in running.items()}
    found = []
    for _ in range(rounds):
        found.append([(q, programs[0]) for q, programs in asked.items()])
        for (q, _), verdict in zip(found[-1], forcing.evaluate(found[-1]), strict=True):
            asked[q] = running[q].send([float(verdict.correct)])
    return found


def grid(
    questions: Sequence[EncodedQuestion], depth: int, forcing: TeacherForcing, rounds: int
) -> list[list[Pair]]:
    """The programs that the search of one question looks at, each on every question."""
    found: list[list[Pair]] = []
    for pairs in searches(questions[:1], depth, forcing, rounds):
        program = pairs[0][1]
        found.append([(question, program) for question in questions])
    return found


class Tally:
    """Seconds a pair of each contender, and verdicts that differ from those of plain generation."""

    def __init__(self, names: Collection[str]) -> None:
        self._order = random.Random(1)
        self.seconds: dict[str, list[float]] = {name: [] for name in ("plain", *names)}
        self.differing: dict[str, list[Any]] = {name: [] for name in names}
        self.sampled = self.right = 0

    def run(
        self,
        plain: Plain,
        contenders: Mapping[str, Any],
        *,
        pairs: Sequence[Pair],
        sample: Sequence[int],
    ) -> None:
        """A round of all contenders, in random order; generation takes part in the sample only."""
        found: dict[str, Any] = {}
        for name in self._order.sample(list(self.seconds), len(self.seconds)):
            asked = [pairs[i] for i in sample] if name == "plain" else pairs
            judge = plain if name == "plain" else contenders[name]
            start = time.perf_counter()
            found[name] = judge.evaluate(asked)
            self.seconds[name].append((time.perf_counter() - start) / len(asked))
        self.sampled += len(sample)
        self.right += sum(found["plain"])
        for i, wanted in zip(sample, found["plain"], strict=True):
            for name in contenders:
                if found[name][i].correct != wanted:
                    self.differing[name].append(found[name][i].margin)


def measure(
    options: argparse.Namespace, prompt: str, *, pattern: str, size: tuple[int, int], loaded: Any
) -> dict[str, Any]:
    model, tokenizer, compiled = loaded
    template = get_template(prompt, options.task)
    questions = template.encode_all(tokenizer, generate(options.task, size[0], split="train"))
    depth = compiled.depth
    ask = grid if pattern == "grid" else searches
    rounds = ask(questions, depth, TeacherForcing(compiled), size[1])
    plain = Plain(model, tokenizer, template=template)
    contenders: dict[str, Any] = {
        "polar_fx": TeacherForcing(compiled),
        "polar_fx, deterministic": TeacherForcing(compiled, deterministic=True),
        "polar_fx, nothing kept": TeacherForcing(compiled, share=False),
    }
    for contender in (
        plain,
        TeacherForcing(compiled),
        TeacherForcing(compiled, deterministic=True),
    ):
        contender.evaluate(rounds[0][:2])  # warm-up
    tally = Tally(contenders)
    pick = random.Random(2)
    for pairs in track(rounds, description=f"{prompt}, {pattern}", console=Console(stderr=True)):
        every = range(len(pairs))
        sample = every if pattern == "grid" else pick.sample(every, min(_SAMPLE, len(pairs)))
        tally.run(plain, contenders, pairs=pairs, sample=sample)
    seconds = tally.seconds
    forcing: TeacherForcing = contenders["polar_fx"]
    mean = {name: statistics.fmean(s) for name, s in seconds.items()}
    per_second = {name: 1 / s for name, s in mean.items()}
    ratio = {name: mean["plain"] / s for name, s in mean.items()}
    by_round = {name: paired_ratio(seconds["plain"], s) for name, s in seconds.items()}
    return {
        "prompt": template.key,
        "pattern": pattern,
        "task": options.task,
        "questions": len(questions),
        "rounds": len(rounds),
        "pairs": sum(map(len, rounds)),
        "pairs_compared": tally.sampled,
        "right": tally.right,
        "prefix_tokens": len(questions[0].prefix),
        "prompt_tokens": statistics.fmean(len(q.prompt) for q in questions),
        "max_new_tokens": template.max_new_tokens,
        "steps_run": forcing.steps_run,
        "steps_asked": forcing.steps_asked,
        "per_second": per_second,
        "ratio": ratio,
        "ratio_by_round": by_round,
        "margins_of_verdicts_that_differ": tally.differing,
        "seconds_a_pair": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="multiplication")
    parser.add_argument("--prompt", action="append", choices=("few-shot", "direct"))
    parser.add_argument("--pattern", action="append", choices=("grid", "search"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or RESULTS / f"search-speed-cpu-{options.dtype}.json"
    model, tokenizer = polar_fx.load(None, getattr(torch, options.dtype))
    compiled = polar_fx.compile(model, max_length=127)
    report: dict[str, Any] = {
        "benchmark": "search speed",
        "dtype": options.dtype,
        "machine": machine(torch.device("cpu")),
        "runs": [],
    }
    for prompt in options.prompt or ("few-shot", "direct"):
        for pattern in options.pattern or ("grid", "search"):
            run = measure(
                options,
                prompt,
                pattern=pattern,
                size=_SIZES[prompt, pattern],
                loaded=(model, tokenizer, compiled),
            )
            report["runs"].append(run)
            write_json(output, report)
            rates = ", ".join(
                f"{n} {r:.1f}/s ({run['ratio'][n]:.1f} x)" for n, r in run["per_second"].items()
            )
            different = {n: len(d) for n, d in run["margins_of_verdicts_that_differ"].items()}
            compared = f"{run['pairs_compared']} pairs compared, {run['right']} right"
            print(
                f"{run['prompt']}, {pattern}, {compared}: {rates}; verdicts that differ: "
                f"{different}"
            )


if __name__ == "__main__":
    main()

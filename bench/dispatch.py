"""What dispatching costs: the head apart from the choice, the split at the trunk, and each policy
beside the identity.

First, one prompt of 128 random tokens, one row: the predictor's network is timed on real hidden
states, and what it chooses does not matter. Then requests: test questions of the built-in tasks in
few-shot prompts, one at a time and several of all tasks in a batch, which falls into groups by
program. Medians of interleaved rounds, warm-up and compilation apart.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import polar_fx
from measure import RESULTS, machine, paired_ratio, spread, write_json
from polar_fx.predictor.features import Features
from polar_fx.predictor.menu import Menu
from polar_fx.predictor.policy import Calibration
from polar_fx.predictor.saved import load_selector
from polar_fx.predictor.selector import Selector, SelectorNetwork
from polar_fx.program import Program
from polar_fx.questions import TASKS, generate, get_template
from polar_fx.runtime.dispatcher import Dispatcher
from polar_fx.runtime.generator import padded_rows
from polar_fx.runtime.trunk import run_trunk, session_after

_TOKENS = 128


def _selector(folder: Path | None, depth: int, *, hidden_size: int) -> Selector:
    """The one in the folder, or one of the same size with random weights."""
    if folder is not None:
        return load_selector(folder)[0]
    menu = Menu.of([Program.parse(f"skip {i}", depth) for i in range(4, min(depth, 28))])
    network = SelectorNetwork(2 * hidden_size, len(menu))
    return Selector(menu, Features(), network=network, calibration=Calibration(0.0, {0.9: 0.1}))


def _prompts(tokenizer: Any, count: int, *, batch: int) -> list[dict[str, torch.Tensor]]:
    """`count` batches of test questions of all tasks, padded on the left."""
    each = -(-count * batch // len(TASKS))
    rows = [
        (*q.prefix, *q.prompt)
        for task in TASKS
        for q in get_template("few-shot", task).encode_all(
            tokenizer, generate(task, each, 3, split="test")
        )
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    made = []
    for start in range(0, count * batch, batch):
        ids, mask = padded_rows([rows[i] for i in order[start : start + batch]])
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def _requests(
    dispatchers: dict[str, Dispatcher], prompts: list[dict[str, torch.Tensor]], *, new_tokens: int
) -> dict[str, dict[str, Any]]:
    """By policy: milliseconds of a request, its ratio to the identity's of the same round, steps of
    a row, groups of a batch.
    """
    arguments: dict[str, Any] = dict(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    taken: dict[str, list[float]] = {policy: [] for policy in dispatchers}
    steps: dict[str, list[float]] = {policy: [] for policy in dispatchers}
    groups: dict[str, list[int]] = {policy: [] for policy in dispatchers}
    for i, prompt in enumerate((prompts[0], prompts[0], *prompts)):
        for policy, each in dispatchers.items():
            start = time.perf_counter()
            _, report = each.generate(**prompt, **arguments)
            milliseconds = 1e3 * (time.perf_counter() - start)
            if i > 1:  # the first two warm up
                taken[policy].append(milliseconds)
                steps[policy].append(statistics.fmean(d.num_steps for d in report.decisions))
                groups[policy].append(len({d.program for d in report.decisions}))
    return {
        policy: {
            "ms": spread(times),
            "ratio": paired_ratio(times, taken["identity"]),
            "steps": statistics.fmean(steps[policy]),
            "groups": statistics.fmean(groups[policy]),
        }
        for policy, times in taken.items()
    }


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def overheads(
    compiled: polar_fx.CompiledModel, dispatcher: Dispatcher, *, selector: Selector, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of a prefill, of one behind a trunk, and of choosing, a list of rounds each."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, compiled.vocab_size, (1, _TOKENS), generator=rng)
    rows, identity = [ids[0]], Program.identity(compiled.depth)

    def plain() -> None:
        with compiled.session(identity, 1) as session:
            compiled.prefill(identity, session, rows)

    def split() -> None:
        with (
            run_trunk(compiled.runner, rows, num_steps=dispatcher.num_steps) as trunk,
            session_after(compiled.runner, [identity], trunk=trunk) as session,
        ):
            compiled.prefill(identity, session, rows)

    with run_trunk(compiled.runner, rows, num_steps=dispatcher.num_steps) as trunk:
        hidden = [trunk.hidden[0].clone()]
    proposal = selector.propose(hidden)[0]
    parts = {
        "features and network": lambda: selector.propose(hidden),
        "policy": lambda: dispatcher.policy.choose(proposal, dispatcher.calibration),
        "features, network and policy": lambda: dispatcher.decide(hidden),
    }
    times: dict[str, list[float]] = {
        name: [] for name in ("prefill", "prefill behind a trunk", *parts)
    }
    for _ in range(rounds + 3):
        times["prefill"].append(_timed(plain))
        times["prefill behind a trunk"].append(_timed(split))
        for name, work in parts.items():
            times[name].append(statistics.median(_timed(work) for _ in range(20)))
    return {name: taken[3:] for name, taken in times.items()}


def requests_by_policy(
    options: argparse.Namespace, tokenizer: Any, *, dispatcher: Dispatcher, selector: Selector
) -> dict[str, Any]:
    """Whole requests under each policy, by batch."""
    prices = [f"mean_steps<={f:g}" for f in selector.calibration.prices]
    policies = ["identity", "accuracy", *prices, "steps<=0.9"]
    dispatchers = {policy: dispatcher.with_policy(policy) for policy in policies}
    found = {}
    for batch in (1, options.batch):
        prompts = _prompts(tokenizer, options.rounds + 2, batch=batch)
        found[f"batch {batch}"] = _requests(dispatchers, prompts, new_tokens=options.new_tokens)
    return found


def show(overhead: dict[str, Any], ratios: dict[str, Any], *, requests: dict[str, Any]) -> None:
    for name, taken in overhead.items():
        ratio = f", {100 * ratios[name]['median']:.3f} % of a prefill" if name in ratios else ""
        print(f"{name}: {taken['median']:.4f} ms{ratio}")
    for name, found in requests.items():
        for policy, row in found.items():
            print(
                f"{name}, {policy}: {row['ms']['median']:.1f} ms, {row['ratio']['median']:.3f} of "
                f"the identity's, {row['steps']:.1f} steps, {row['groups']:.1f} groups"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--predictor",
        type=Path,
        help="folder of `train` (default: random weights of the same size)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    model, tokenizer = polar_fx.load(None, getattr(torch, options.dtype))
    compiled = polar_fx.compile(model, max_length=191)
    selector = _selector(options.predictor, compiled.depth, hidden_size=model.config.hidden_size)
    dispatcher = compiled.dispatch_by(selector, policy="accuracy")
    compiled.warmup()
    times = overheads(compiled, dispatcher, selector=selector, rounds=options.rounds)
    overhead = {name: spread(taken) for name, taken in times.items()}
    ratios = {
        name: paired_ratio(taken, times["prefill"])
        for name, taken in times.items()
        if name != "prefill"
    }
    requests = requests_by_policy(options, tokenizer, dispatcher=dispatcher, selector=selector)
    show(overhead, ratios, requests=requests)
    write_json(
        RESULTS / f"dispatch-cpu-{options.dtype}.json",
        {
            "benchmark": "dispatch",
            "dtype": options.dtype,
            "machine": machine(torch.device("cpu")),
            "prompt_tokens": _TOKENS,
            "trained": options.predictor is not None,
            "menu": len(selector.menu),
            "shared_steps": dispatcher.num_steps,
            "parameters": sum(p.numel() for p in selector.network.parameters()),
            "ms": overhead,
            "ratio_to_prefill": ratios,
            "requests": requests,
            "new_tokens": options.new_tokens,
        },
    )


if __name__ == "__main__":
    main()

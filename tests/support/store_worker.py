"""Processes for test_store.py: some race, some are killed.

They load no torch, so that they start quickly.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polar_fx.output.digest import digest
from polar_fx.store import ArtifactStore


def contents(number: int) -> dict[str, bytes]:
    """Two files of artifact `number`; the second is shared by every third one."""
    sizes = random.Random(number)
    own = hashlib.shake_256(str(number).encode()).digest(sizes.randrange(1, 60_000))
    return {"code.pt2": own, "table.bin": bytes([number % 3]) * 20_000}


def facts(number: int) -> dict[str, Any]:
    return {"kind": "layer", "body": f"layer_kind_{number}", "number": number}


def key(number: int) -> str:
    return digest(facts(number))


def maker(number: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, content in contents(number).items():
            (folder / name).write_bytes(content)

    return make


def put(store: ArtifactStore, number: int) -> dict[str, Path]:
    return store.get_or_make(key(number), facts(number), make=maker(number))[0]


def read(paths: dict[str, Path] | None) -> dict[str, bytes] | None:
    return None if paths is None else {name: path.read_bytes() for name, path in paths.items()}


def race(root: Path, log: Path) -> None:
    """Want one artifact when everybody is ready; what is made leaves a line in the log."""

    def make(folder: Path) -> None:
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(0.3)  # until all others wait
        maker(1)(folder)

    print("ready", flush=True)
    sys.stdin.readline()
    paths, made = ArtifactStore(root, 0).get_or_make(key(1), facts(1), make=make)
    print(json.dumps([made, read(paths) == contents(1)]))


def churn(root: Path, seed: int) -> None:
    """Want artifacts at random where there is room for a few only; prints what was refused, and
    what was wrong.
    """
    store, chosen = ArtifactStore(root, 120_000), random.Random(seed)
    wrong = 0
    for _ in range(40):
        number = chosen.randrange(8)
        paths = put(store, number)
        try:
            wrong += read(paths) != contents(number)
        except FileNotFoundError:  # evicted again already
            continue
    print(json.dumps([[r.reason for r in store.refusals], wrong]))


def kill_often(root: Path, kills: int) -> None:
    """Kill processes that keep storing, shortly after they stored so many; prints those, and what
    is refused since.
    """
    moments = random.Random(kills)
    for attempt in range(kills):
        get, report = os.pipe()
        child = os.fork()
        if not child:
            store, chosen = ArtifactStore(root, 0), random.Random(attempt)
            for number in itertools.count(1000 * attempt):
                put(store, number)
                os.write(report, f"{number}\n".encode())
                put(store, chosen.randrange(1000 * attempt, number + 1))
        os.close(report)
        with os.fdopen(get) as lines:
            stored = [int(lines.readline()) for _ in range(moments.randrange(4))]
            time.sleep(moments.uniform(0.0, 0.005))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            stored += [int(line) for line in lines]
        print(json.dumps([stored, [r.reason for r in ArtifactStore(root, 0).verify()]]), flush=True)


def kill_everywhere(template: Path, roots: Path, *, limit_bytes: int) -> None:
    """On a copy each, refuse artifact 0, store artifact 9 and evict, killed before the first, the
    second, ... file operation.

    Ends with a process that gets through.
    """
    for step in itertools.count():
        root = roots / str(step)
        shutil.copytree(template, root)
        child = os.fork()
        if not child:
            operations = itertools.count()

            def kill(event: str, _: Any, operations: Any = operations, step: int = step) -> None:
                if (event == "open" or event.startswith(("os.", "fcntl."))) and next(
                    operations
                ) == step:
                    signal.raise_signal(signal.SIGKILL)

            store = ArtifactStore(root, limit_bytes)
            sys.addaudithook(kill)
            store.get(key(0), facts(0))
            put(store, 9)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    {
        "race": lambda root, log: race(Path(root), Path(log)),
        "churn": lambda root, seed: churn(Path(root), int(seed)),
        "kill_often": lambda root, kills: kill_often(Path(root), int(kills)),
        "kill_everywhere": lambda template, roots, limit: kill_everywhere(
            Path(template), Path(roots), limit_bytes=int(limit)
        ),
    }[mode](*arguments)

"""The processes of the GPU benchmark: started, given their turns by files in a folder, ended when
their time is up.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_results
from polar_fx.output.files import replace_file

ROOT = Path(__file__).parent.parent
_LOG = 40_000  # characters kept of what a worker printed


class Team:
    """Workers by name. `scratch` holds their logs, caches and turns; `out` the lines of results."""

    def __init__(self, out: Path, scratch: Path, *, started: float) -> None:
        self.out, self.scratch, self.started = out, scratch, started
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._limits: dict[str, float] = {}

    def say(self, stage: str, **found: Any) -> None:
        """Write a line of results."""
        gpu_results.append(
            self.out / "results.jsonl",
            {"t": round(time.time() - self.started, 1), "stage": stage, **found},
        )

    def start(self, name: str, command: Sequence[str], *, limit: float) -> None:
        """Start a worker that is to be over at the time `limit`; fresh caches, unless the
        environment names some.
        """
        cores = os.cpu_count() or 2
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "TRITON_CACHE_DIR": "triton",
            "POLAR_FX_CACHE_DIR": "polar_fx",
        }
        paths = [
            str(ROOT),
            str(ROOT / "bench"),
            str(ROOT / "tests" / "support"),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
        variables = {
            **{variable: str(self.scratch / folder) for variable, folder in caches.items()},
            "OMP_NUM_THREADS": str(max(1, cores // 8)),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // 4)),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        with open(self.scratch / f"{name}.log", "wb") as log:
            self._running[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )
        self._limits[name] = limit

    def stop(self, name: str) -> None:
        """End a worker with the processes it started; say so if it had not finished, or failed."""
        process = self._running.pop(name, None)
        if process is None:
            return
        early = process.poll() is None
        if early:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if early and not self.is_done(name):
            self.say("stopped", worker=name, reason="its time was up")
        elif not early and process.returncode:
            text = (self.scratch / f"{name}.log").read_text(errors="replace").strip()
            self.say(
                "ended", worker=name, error=f"exit status {process.returncode}", last=text[-300:]
            )

    def stop_all(self) -> None:
        for name in list(self._running):
            self.stop(name)

    def wait_until(self, met: Callable[[], bool], limit: float) -> None:
        """Wait for something, until the time `limit` at most; meanwhile end workers that are over
        theirs.
        """
        while not met() and time.time() < limit:
            for name in [n for n in self._running if time.time() > self._limits[n] + 2]:
                self.stop(name)
            time.sleep(0.05)

    # --------------------------------------------------------------------------- states of a worker

    def is_running(self, name: str) -> bool:
        return name in self._running and self._running[name].poll() is None

    def is_ready(self, name: str) -> bool:
        """Has it prepared everything, and does it wait for its turn?"""
        return self.is_running(name) and (self.scratch / f"ready.{name}").exists()

    def is_settled(self, name: str) -> bool:
        """Is nothing of its preparation left to wait for?"""
        return self.is_ready(name) or not self.is_running(name)

    def is_done(self, name: str) -> bool:
        return (self.scratch / f"done.{name}").exists()

    def give_turn(self, name: str, until: float) -> None:
        """Let it have the machine until then."""
        replace_file(self.scratch / f"turn.{name}", [str(until).encode()])

    def logs(self) -> str:
        """The end of what each worker printed."""
        files = sorted(self.scratch.glob("*.log"))
        return "".join(f"===== {f.stem}\n{f.read_text(errors='replace')[-_LOG:]}\n" for f in files)

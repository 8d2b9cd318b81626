"""`python -m polar_fx search`: from questions to a file of records, resumed after whatever ended
it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polar_fx.cli import main
from polar_fx.search.records.record_file import RecordReader
from tiny_search import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny(tmp_path_factory.mktemp("model"))
    rows = [
        {"id": f"r{i}", "question": f"{i}?", "answer": [str(i % 3), "yes"], "task": "odd"}
        for i in range(8)
    ]
    (made / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return made


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "search",
        "--model",
        str(folder),
        "--backend",
        "eager",
        "--data",
        str(folder / "rows.jsonl"),
        "--prompt",
        "plain",
        "--simulations",
        "12",
        "--out",
        str(out),
        "--json",
        *more,
    ]


def records(out: Path) -> dict[str, Any]:
    return {r.question.id: (r.baseline, r.explored, r.seed) for r in RecordReader(out)}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out") / "run.jsonl"
    assert main(arguments(folder, out, "--deterministic")) == 0
    return records(out)


def test_a_search_and_its_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.jsonl"
    assert main(arguments(folder, out)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["questions"] == result["searched"] == 8
    assert result["evaluations"] == sum(len(r.explored) + 1 for r in RecordReader(out)) > 8 * 8
    header = RecordReader(out).header
    how = {"judge": "teacher-forcing", "deterministic": False, "verify": False, "dtype": "float32"}
    assert header.prompt == {"odd": "plain@1", **how}
    assert header.config.simulations == 12 and len(header.model) == 64
    assert main(arguments(folder, out)) == 0
    assert json.loads(capsys.readouterr().out)["searched"] == 0, "all of it is there"


@pytest.mark.slow
def test_two_runs_of_one_seed_agree(
    folder: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    assert (
        main(arguments(folder, tmp_path / "again.jsonl", "--deterministic", "--in-flight", "3"))
        == 0
    )
    assert records(tmp_path / "again.jsonl") == undisturbed
    assert main(arguments(folder, tmp_path / "other.jsonl", "--deterministic", "--seed", "1")) == 0
    assert records(tmp_path / "other.jsonl") != undisturbed


def test_built_in_questions_get_a_difficulty(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    chosen = [
        "--task",
        "addition",
        "--task",
        "sequences",
        "--questions",
        "5",
        "--prompt",
        "few-shot",
    ]
    plain = [
        a
        for a in arguments(folder, out)
        if a not in ("--data", str(folder / "rows.jsonl"), "--prompt", "plain")
    ]
    assert main([*plain, *chosen, "--method", "random"]) == 0
    found = [r.question for r in RecordReader(out)]
    assert [q.task for q in found].count("addition") == 3 and len(found) == 5
    assert {q.difficulty for q in found} == {5}, "random weights answer nothing"


def test_generation_judges_and_verifies(folder: Path, tmp_path: Path) -> None:
    assert (
        main(
            arguments(
                folder,
                tmp_path / "a.jsonl",
                "--judge",
                "generation",
                "--method",
                "scan",
                "--simulations",
                "6",
            )
        )
        == 0
    )
    assert all(
        e.verdict.margin is None for r in RecordReader(tmp_path / "a.jsonl") for e in r.explored
    )
    assert main(arguments(folder, tmp_path / "b.jsonl", "--verify")) == 0
    for record in RecordReader(tmp_path / "b.jsonl"):
        right = {e.program for e in record.explored if e.verdict.correct}
        assert right <= set(record.verified) and set(record.valid) <= right
    asked = [
        "--task",
        "addition",
        "--questions",
        "2",
        "--prompt",
        "few-shot",
        "--judge",
        "generation",
        "--simulations",
        "2",
    ]
    plain = [
        a
        for a in arguments(folder, tmp_path / "c.jsonl")
        if a not in ("--data", str(folder / "rows.jsonl"), "--prompt", "plain")
    ]
    assert main([*plain, *asked]) == 0
    assert {r.question.difficulty for r in RecordReader(tmp_path / "c.jsonl")} == {5}


def test_an_edited_answer_is_another_search(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    for answer in ("1", "2"):
        rows.write_text(
            json.dumps({"id": "q", "question": "1?", "answer": answer, "task": "odd"}) + "\n"
        )
        chosen = [
            a if a != str(folder / "rows.jsonl") else str(rows)
            for a in arguments(folder, tmp_path / "run.jsonl")
        ]
        assert main(chosen) == (0 if answer == "1" else 2)
    assert "task" in capsys.readouterr().err


def test_processes_find_what_one_finds(
    folder: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    assert (
        main(
            arguments(
                folder,
                tmp_path / "run.jsonl",
                "--deterministic",
                "--workers",
                "2",
                "--in-flight",
                "2",
            )
        )
        == 0
    )
    assert records(tmp_path / "run.jsonl") == undisturbed


TWO_MACHINES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(other, allow_graceful=False)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def two_machines() -> Iterator[subprocess.Popen[str]]:
    """A Ray cluster of two nodes with room for one worker each: it prints its address, and loses a
    node when told a line.
    """
    pytest.importorskip("ray")
    command = [sys.executable, "-c", TWO_MACHINES]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        yield cluster
        cluster.communicate()


@pytest.mark.slow
def test_a_search_on_a_cluster_outlives_its_driver_and_a_machine(
    folder: Path, tmp_path: Path, two_machines: Any
) -> None:
    address = two_machines.stdout.readline().strip()
    longer = ("--simulations", "200")  # the second run must not end before the machine is lost
    assert main(arguments(folder, tmp_path / "alone.jsonl", "--deterministic", *longer)) == 0
    wanted, out = records(tmp_path / "alone.jsonl"), tmp_path / "run.jsonl"
    first = process(folder, out, *longer, "--workers", "1", "--ray", address)
    wait_for_records(out, 1, running=first)
    first.kill()
    _, errors = first.communicate()
    assert out.exists(), errors
    finished = records(out)
    assert finished and all(wanted[name] == found for name, found in finished.items())
    # one worker more than there is room for
    second = process(folder, out, *longer, "--workers", "3", "--ray", address)
    wait_for_records(out, len(finished) + 1, running=second)
    two_machines.stdin.write("\n")
    two_machines.stdin.flush()
    _, errors = second.communicate(timeout=900)
    assert second.returncode == 0, errors
    assert "an actor was lost" in errors
    assert records(out) == wanted


def test_a_cluster_without_ray(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments(folder, tmp_path / "run.jsonl", "--ray")) == 2
    assert "needs ray, which is not installed; pip install" in capsys.readouterr().err


def test_a_cluster_that_is_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    assert main(arguments(folder, tmp_path / "run.jsonl", "--ray", "nowhere")) == 2
    assert "no Ray cluster can be reached at 'nowhere'" in capsys.readouterr().err


@pytest.mark.slow
def test_what_fails_in_a_worker_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            arguments(
                folder,
                tmp_path / "run.jsonl",
                "--workers",
                "2",
                "--judge",
                "generation",
                "--reward",
                "margin",
            )
        )
        == 2
    )
    assert "the reward 'margin' needs teacher-forced verdicts" in capsys.readouterr().err


def process(folder: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "polar_fx",
        *arguments(folder, out, "--deterministic", "--in-flight", "1", *more),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_records(out: Path, count: int, *, running: subprocess.Popen[str]) -> None:
    while running.poll() is None and (
        not out.exists() or out.read_bytes().count(b"\n") < count + 1
    ):
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_where_it_was(
    folder: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    out = tmp_path / "run.jsonl"
    pick = random.Random(0)
    finished = 0
    for kill in range(2):
        running = process(folder, out)
        wait_for_records(out, finished + 1, running=running)
        time.sleep(pick.uniform(0, 0.05))
        running.kill()
        running.communicate()
        before, finished = finished, len(list(RecordReader(out)))
        assert finished > before, f"kill {kill}: what was finished is there"
        assert all(undisturbed[name] == found for name, found in records(out).items())
    assert main(arguments(folder, out, "--deterministic")) == 0
    assert records(out) == undisturbed


def test_an_interruption_is_clean(
    folder: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    out = tmp_path / "run.jsonl"
    running = process(folder, out)
    # one that is being written when the signal comes is taken back
    wait_for_records(out, 2, running=running)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    if running.returncode == 0:
        pytest.skip("it had finished before the interruption")
    assert running.returncode == 130
    assert "Traceback" not in errors and "interrupted" in errors
    reader = RecordReader(out)
    found = {r.question.id for r in reader}
    assert found and reader.tail is None
    assert all(undisturbed[name] == got for name, got in records(out).items())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--task", "addition"], "either tasks or files of data"),
        (["--split", "test", "--questions", "8"], "8 questions are asked but the files of data"),
        (["--questions", "9"], "9 questions are asked but the files of data hold 8"),
        (["--method", "luck"], "unknown search method 'luck'"),
        (["--reward", "luck"], "unknown reward 'luck'"),
        (["--set", "luck=1"], "--set 'luck=1' is no setting"),
        (["--set", "exploration=much"], "'much' is not of type float"),
        (["--set", "length_penalty=-1"], "length_penalty is -1"),
        (["--prompt", "luck"], "unknown prompt 'luck'"),
        (["--prompt", "few-shot"], "no few-shot prompt for the task 'odd'"),
    ],
)
def test_bad_input_leaves_no_file(
    folder: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "run.jsonl", *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_malformed_rows_and_other_searches_are_refused(
    folder: Path, tmp_path: Path, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1?", "answer": "1"}\n{"question": "2?"}\n')
    assert main([*arguments(folder, tmp_path / "run.jsonl"), "--data", str(rows)]) == 2
    assert "line 2" in capsys.readouterr().err
    out = tmp_path / "out.jsonl"
    assert main(arguments(folder, out)) == 0
    kept = out.read_bytes()
    assert main(arguments(folder, out, "--seed", "7")) == 2
    assert "seed" in capsys.readouterr().err
    assert out.read_bytes() == kept
    assert main(arguments(folder, out, "--seed", "7", "--restart")) == 0
    assert (tmp_path / "out.jsonl.old").read_bytes() == kept

"""The server as users start it, on loopback, asked by OpenAI's own client."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="serving needs pip install 'polar_fx[serve]'")
openai = pytest.importorskip(
    "openai", reason="the client library is not installed: pip install openai"
)

from browser import CHROMIUM, browser  # noqa: E402
from polar_fx.bundle import export, load_bundle  # noqa: E402
from polar_fx.cli import main  # noqa: E402
from polar_fx.serving.service import Service  # noqa: E402
from served_bundles import TEMPLATE, alone  # noqa: E402
from tiny_bundles import PROGRAMS, compiled_model, tokenizer_of_words  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundles") / "tiny"
    tokenizer, model = tokenizer_of_words(), compiled_model()
    tokenizer.chat_template = TEMPLATE
    model.generation_config.eos_token_id = None
    export(model, place, PROGRAMS, tokenizer=tokenizer)
    return place


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server, which is ended as by a service manager.

    (Ctrl-C would not do where tests run in the background.)
    """
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "server.txt"
    command = [
        sys.executable,
        "-m",
        "polar_fx",
        "serve",
        str(folder),
        "--port",
        port,
        "--json",
    ]
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as server,
    ):
        try:
            deadline = time.monotonic() + 300
            while (
                server.poll() is None
                and "Ctrl-C ends it" not in log.read_text()
                and time.monotonic() < deadline
            ):
                time.sleep(0.1)
            assert server.poll() is None and "Ctrl-C ends it" in log.read_text(), log.read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(120)
            except subprocess.TimeoutExpired:
                server.kill()
    said = log.read_text()
    assert server.returncode == 0 and "Traceback" not in said, said
    assert not re.search(r"\b(INFO|WARNING)\b|pid=", said), said


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode()


def count_of(url: str, name: str) -> float:
    """Sum of a metric over its labels."""
    lines = [line for line in get(f"{url}/metrics").splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt install chromium)")
def test_the_playground_shows_an_answer_beside_the_identitys(
    url: str, folder: Path, tmp_path: Path
) -> None:
    service = Service(load_bundle(folder), "tiny")
    texts = [
        alone(service, [5, 6, 7], program=program, tokens=6) for program in ("skip 1", "identity")
    ]
    with browser(tmp_path / "profile") as chromium:
        chromium.visit(f"{url}/")
        assert chromium.value("document.title") == "tiny"
        assert chromium.value("chat.checked") is True
        chromium.value("chat.checked = false; prompt_.value = 'w5 w6 w7'; tokens.value = 6")
        chromium.value("program.value = '1'; ask.requestSubmit()")
        while chromium.value("go.disabled"):
            pass
        shown = chromium.value(
            "[...answers.children].map(a => [a.querySelector('h2').textContent, "
            "a.querySelector('.text').textContent, a.querySelector('.numbers').textContent])"
        )
        assert [each[:2] for each in shown] == [["skip 1", texts[0]], ["identity", texts[1]]]
        assert shown[0][2].startswith("3 steps · 6 tokens") and "cut at the limit" in shown[0][2]
        assert chromium.value("answers.querySelectorAll('svg').length") == 2
        chromium.value("prompt_.value = 'w5 '.repeat(200); ask.requestSubmit()")
        while chromium.value("go.disabled"):
            pass
        failed = "[...answers.querySelectorAll('.failed')].map(a => a.textContent)"
        assert all("exceed the 63 tokens" in each for each in chromium.value(failed))
        assert all("400" in each for each in chromium.complaints), "nothing else is complained of"


def test_completions_are_those_of_the_bundle(client: Any, folder: Path) -> None:
    service = Service(load_bundle(folder), "tiny")
    for program in ("identity", "skip 1"):
        found = client.completions.create(
            model="tiny",
            prompt="w5 w6 w7",
            max_tokens=6,
            temperature=0,
            extra_body={"program": program},
        )
        assert (
            found.choices[0].text == alone(service, [5, 6, 7], program=program, tokens=6)
            and found.choices[0].finish_reason == "length"
        )
        assert found.usage.total_tokens == 9
        used = found.choices[0].model_extra["polar_fx"]
        assert used == {
            "program": str(service.bundle.resolve(program)),
            "steps": used["steps"],
            "probability": None,
            "rows": 1,
        }
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "w5 w6 w7"}],
        max_completion_tokens=6,
        temperature=0,
    )
    assert chat.choices[0].message.content == alone(
        service, [5, 6, 7], program="identity", tokens=6
    )
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.polar_fx["programs"] == [
        "0-3 /4",
        "0 2-3 /4",
        "0 (1-2)*2@0.5 3 /4",
    ]


def test_answers_come_as_they_are_made(client: Any) -> None:
    given: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(prompt="w5 w6 w7", **given).choices[0]
    events = list(
        client.completions.create(
            prompt="w5 w6 w7", stream=True, stream_options={"include_usage": True}, **given
        )
    )
    assert "".join(e.choices[0].text for e in events[:-1]) == whole.text and len(events) > 3
    assert (
        events[-2].choices[0].finish_reason == "length"
        and events[-2].choices[0].polar_fx["steps"] == 4
    )
    assert events[-1].usage.total_tokens == 9 and not events[-1].choices
    said = client.chat.completions.create(
        messages=[{"role": "user", "content": "w5 w6 w7"}], stream=True, **given
    )
    assert "".join(e.choices[0].delta.content for e in said) == whole.text


def test_requests_join_those_that_run(client: Any, url: str) -> None:
    before = count_of(url, "polar_fx_answers_total")

    def ask(number: int) -> Any:
        program = {"program": ("skip 1", "identity")[number % 2]}
        return client.completions.create(
            model="tiny", prompt=[3 + number] * 4, max_tokens=50, temperature=0, extra_body=program
        )

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(8)))
    assert count_of(url, "polar_fx_answers_total") - before == 8
    rows = [f.choices[0].model_extra["polar_fx"]["rows"] for f in found]
    print(f"8 requests ran beside {rows}")
    assert max(rows) > 1


def test_health_and_metrics_answer_while_many_requests_wait(client: Any, url: str) -> None:
    def ask(number: int) -> int:
        given: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 0}
        try:
            client.completions.create(prompt=[[3 + number]] * 4, **given)
        except openai.InternalServerError as error:
            return error.status_code
        return 200

    with ThreadPoolExecutor(40) as threads:
        running = [threads.submit(ask, number) for number in range(40)]
        while not all(r.done() for r in running):
            assert '"ok"' in get(f"{url}/health") and "tiny" in get(f"{url}/v1/models")
            get(f"{url}/metrics")
    found = {r.result() for r in running}
    assert found <= {200, 503} and 200 in found


def test_refusals_are_the_clients_own_errors(client: Any) -> None:
    given: dict[str, Any] = {"model": "tiny", "prompt": "w5", "max_tokens": 2}
    for more, error, message in (
        ({"extra_body": {"program": "skip 9"}}, openai.BadRequestError, "use one of '0-3 /4'"),
        ({"prompt": [5] * 70}, openai.BadRequestError, "exceed the 63 tokens"),
        ({"n": 2}, openai.BadRequestError, "n: "),
        ({"model": "other"}, openai.NotFoundError, "use 'tiny'"),
    ):
        with pytest.raises(error, match=message) as refused:
            client.completions.create(**{**given, **more})
        assert refused.value.type == "invalid_request_error"


def test_a_client_that_leaves_is_noticed(client: Any, url: str) -> None:
    left = 'polar_fx_requests_total{route="/v1/completions",status="499"}'
    impatient = client.with_options(timeout=0.05)
    for _ in range(100):  # 64 answers take longer than that
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(model="tiny", prompt=["w5"] * 64, max_tokens=60)
        if count_of(url, left):
            break
    assert count_of(url, left)
    deadline = time.monotonic() + 60
    while count_of(url, "polar_fx_waiting") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (
        client.completions.create(model="tiny", prompt="w5", max_tokens=1).usage.completion_tokens
        == 1
    )


def test_health_and_metrics(url: str, client: Any) -> None:
    assert get(f"{url}/health") == '{"status":"ok"}'
    client.completions.create(model="tiny", prompt="w5", max_tokens=2)
    text = get(f"{url}/metrics")
    assert 'polar_fx_requests_total{route="/v1/completions",status="200"}' in text
    assert "polar_fx_request_seconds_bucket" in text and "polar_fx_new_tokens_total" in text
    assert "polar_fx_first_token_seconds_bucket" in text and count_of(url, "polar_fx_kv_bytes") > 0
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{url}/v1/nothing")


def test_what_cannot_be_served_is_said_at_once(
    folder: Path,
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for arguments, message in (
        ([str(tmp_path)], "manifest.json"),
        ([str(folder), "--port", url.rpartition(":")[2]], "nothing can listen at 127.0.0.1:"),
        ([str(folder), "--fingerprint", "0" * 64], "has fingerprint"),
        ([str(folder), "--policy", "accuracy"], "needs a predictor, and the bundle"),
        ([str(folder), "--policy", "skip 2"], "holds no such program; add it with `bundle add"),
        (
            [str(folder), "--port", free_port()],
            "serving needs ray, which is not installed; pip install",
        ),
    ):
        assert main(["serve", *arguments]) == 2
        assert message in capsys.readouterr().err

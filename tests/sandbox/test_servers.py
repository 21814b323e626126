"""Sandboxes on other machines: what ``sandbox serve`` lends, and SandboxFusion's ``/run_code``."""

from __future__ import annotations

import asyncio
import base64
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web

from megatron_gspo.config import SandboxConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.sandbox import Limits, Outcome, Program, Verdict, open_sandbox, remote, wire
from megatron_gspo.sandbox.local import LocalSandbox
from megatron_gspo.sandbox.server import MOST_AHEAD, application, runner_of, shared_key
from tests.sandbox.world import descendants, named, outlasting

LIMITS = Limits(wall_s=20.0, cpu_s=5.0)
ECHO = Program("python", "print(input()[::-1])")


@asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[str]:
    runner = runner_of(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def lent(tmp_path: Path) -> AsyncIterator[tuple[str, str]]:
    """(URL, file of the key) of a server with one program at once."""
    file = tmp_path / "key"
    key = shared_key(file)
    async with LocalSandbox(SandboxConfig(concurrency=1)) as sandbox, listening(application(sandbox, key)) as url:
        yield url, str(file)


def served(url: str, file: str, **settings: Any) -> SandboxConfig:
    return SandboxConfig(backend="server", servers=(url,), key_file=file, **settings)


@pytest.mark.usefixtures("namespaces")
def test_a_server_runs_programs_as_this_machine_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with lent(tmp_path) as (url, file), open_sandbox(served(url, file)) as sandbox:
            outcomes = await sandbox.run(ECHO, [b"ab\n", b"cd\n", b"ef\n"], LIMITS, go_on=lambda index, _: index < 1)
            assert [(o.verdict, o.status, o.stdout) for o in outcomes] == [
                (Verdict.OK, 0, b"ba\n"),
                (Verdict.OK, 0, b"dc\n"),
            ]
            assert all(0 < outcome.cpu_s < outcome.wall_s + 1 for outcome in outcomes)
            reading = Program("python", "print(open('a/b').read())\nraise SystemExit(3)", {"a/b": b"hello"})
            (outcome,) = await sandbox.run(reading, [b""], LIMITS)
            assert (outcome.verdict, outcome.status, outcome.stdout) == (Verdict.CRASHED, 3, b"hello\n")
            (outcome,) = await sandbox.run(Program("cpp", "int main() { return x; }"), [b"1", b"2"], LIMITS)
            assert outcome.verdict is Verdict.COMPILE and b"x" in outcome.stderr

    asyncio.run(main())


@pytest.mark.usefixtures("namespaces")
def test_a_client_that_goes_away_ends_what_it_had_run_and_what_waited(tmp_path: Path) -> None:
    async def main() -> None:
        async with lent(tmp_path) as (url, file):
            async with open_sandbox(served(url, file)) as sandbox:
                sleeping = Program("python", "import time\ntime.sleep(600)")
                runs = [
                    asyncio.create_task(sandbox.run(sleeping, [b""], Limits(wall_s=600, cpu_s=60))) for _ in range(2)
                ]
                while not any(named(p) == "python3" for p in descendants()):
                    await asyncio.sleep(0.02)
                for task in runs:
                    task.cancel()
                await asyncio.gather(*runs, return_exceptions=True)
            async with open_sandbox(served(url, file)) as sandbox:
                began = time.monotonic()
                (outcome,) = await sandbox.run(ECHO, [b"ab\n"], LIMITS)
                assert outcome.stdout == b"ba\n" and time.monotonic() - began < 200, "others would take 600 s"

    asyncio.run(main())
    assert descendants() == []


@pytest.mark.usefixtures("namespaces")
def test_without_the_key_nothing_is_answered_and_nothing_is_run(tmp_path: Path) -> None:
    async def main() -> None:
        async with lent(tmp_path) as (url, file):
            async with aiohttp.ClientSession() as session:
                for path in ("/check", "/run", "/nothing"):
                    for headers in (
                        {},
                        {"Authorization": "Bearer wrong"},
                        {"Authorization": Path(file).read_text().strip()},
                    ):
                        async with session.get(url + path, headers=headers) as reply:
                            assert reply.status == 401, path
            other = tmp_path / "other"
            shared_key(other)
            with pytest.raises(ConfigError, match="asks for another key"):
                async with open_sandbox(served(url, str(other))):
                    pass

    asyncio.run(main())


def test_a_request_that_cannot_be_read_is_refused_and_the_key_in_it_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = "a-key-that-nobody-else-may-read"
    requests = {
        f"GET /check HTTP/1.1\r\nHost: x\r\nAuthorization Bearer {key}\r\n\r\n": b"400",
        f"Authorization: Bearer {key}\r\n\r\n": b"400",
        f"GET /check HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\xff\r\n\r\n": b"401",
        f"GET /check HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n": b"200",
    }

    async def main() -> None:
        async with listening(application(LocalSandbox(SandboxConfig()), key)) as url:
            for request, status in requests.items():
                reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                writer.write(request.encode("latin-1"))
                assert (await reader.readuntil(b"\r\n")).split()[1] == status, request
                writer.close()

    asyncio.run(main())
    assert caplog.text == ""


@pytest.mark.usefixtures("namespaces")
def test_a_client_that_does_not_wait_for_answers_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with lent(tmp_path) as (url, file), aiohttp.ClientSession() as session:
            headers = {"Authorization": f"Bearer {Path(file).read_text().strip()}"}
            async with session.ws_connect(f"{url}/run", headers=headers) as connection:
                source = b"import time\ntime.sleep(60)"
                await connection.send_bytes(wire.of_program(Program("python", ""), source, Limits(wall_s=60.0)))
                for _ in range(MOST_AHEAD + 3):
                    await connection.send_bytes(wire.pack({"run": True}, [b""]))
                while (message := await connection.receive(120)).type is aiohttp.WSMsgType.BINARY:
                    pass
                assert message.data == 1008 and "messages ahead" in str(message.extra)

    asyncio.run(main())


def test_the_key_is_made_for_its_owner_alone_and_kept(tmp_path: Path) -> None:
    key = shared_key(tmp_path / "key")
    assert len(key) >= 40 and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert shared_key(tmp_path / "key") == key
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0640"):
        shared_key(tmp_path / "key")


def test_a_server_that_is_away_is_no_fault_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    shared_key(tmp_path / "key")

    async def main() -> list[Outcome]:
        async with open_sandbox(served("http://127.0.0.1:9", str(tmp_path / "key"), retries=2)) as sandbox:
            return await sandbox.run(ECHO, [b"", b""], LIMITS)

    (outcome,) = asyncio.run(main())
    assert outcome.verdict is Verdict.FAILED and b"asked 3 times" in outcome.stderr and b"127.0.0.1:9" in outcome.stderr


@pytest.mark.usefixtures("namespaces")
def test_a_lost_connection_goes_on_at_another_server_with_the_input_that_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    given: list[int] = []

    async def ends_early(request: web.Request) -> web.WebSocketResponse:
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        given.append(len((await connection.receive()).data))
        return connection

    async def fine(request: web.Request) -> web.Response:
        return web.Response()

    async def main() -> None:
        app = web.Application()
        app.add_routes([web.get("/run", ends_early), web.get("/check", fine)])
        async with lent(tmp_path) as (url, file), listening(app) as broken:
            config = SandboxConfig(backend="server", servers=(broken, url), key_file=file)
            async with open_sandbox(config) as sandbox:
                outcomes = await sandbox.run(ECHO, [b"ab\n", b"cd\n"], LIMITS)
        assert [outcome.stdout for outcome in outcomes] == [b"ba\n", b"dc\n"]
        assert len(given) == 1

    asyncio.run(main())


@pytest.mark.usefixtures("namespaces")
def test_the_command_serves_until_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_gspo.cli", "sandbox", "serve", "--key-file", str(tmp_path / "key")]
    server = subprocess.Popen([*command, "sandbox.concurrency=1"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = server.stderr.readline()
    assert "http://127.0.0.1:" in line and "1 programs at once" in line

    async def main() -> bytes:
        async with open_sandbox(served(line.split()[1].rstrip(","), str(tmp_path / "key"))) as sandbox:
            return (await sandbox.run(ECHO, [b"ab\n"], LIMITS))[0].stdout

    assert asyncio.run(main()) == b"ba\n"
    started = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(signal.SIGTERM)
    assert server.wait(120) == 0 and server.stderr.read() == ""
    server.stderr.close()
    assert outlasting(started) == []


FINISHED = {"status": "Finished", "execution_time": 0.02, "return_code": 0, "stdout": "", "stderr": ""}


def said(status: str = "Success", run: Any = FINISHED, compiled: Any = None, message: str = "") -> dict[str, Any]:
    """An answer of ``/run_code``: every field of its RunCodeResponse."""
    return {
        "status": status,
        "message": message,
        "compile_result": compiled,
        "run_result": run,
        "executor_pod_name": None,
        "files": {},
    }


@contextmanager
def fusion(*answers: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A stand-in that answers in turn: an HTTP status, None to break the connection, or an answer."""
    asked: list[dict[str, Any]] = []
    waiting = list(answers)
    loop, started, url = asyncio.new_event_loop(), threading.Event(), []

    async def run_code(request: web.Request) -> web.Response:
        asked.append(await request.json())
        answer = waiting.pop(0)
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=answer) if isinstance(answer, int) else web.json_response(answer)

    async def main() -> None:
        app = web.Application()
        app.add_routes([web.post("/run_code", run_code)])
        async with listening(app) as at:
            url.append(at)
            started.set()
            await ended.wait()

    ended = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert started.wait(60)
    try:
        yield url[0], asked
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(60)
        loop.close()


def ask(url: str, program: Program, *inputs: bytes, limits: Limits = LIMITS, **settings: Any) -> list[Outcome]:
    async def main() -> list[Outcome]:
        config = SandboxConfig(backend="sandboxfusion", servers=(url,), **settings)
        async with open_sandbox(config) as sandbox:
            return await sandbox.run(program, inputs, limits)

    return asyncio.run(main())


def test_sandboxfusion_is_sent_every_field_of_its_request() -> None:
    limits = Limits(wall_s=7.5, memory_bytes=100 * 2**20 + 1)
    with fusion(said(run={**FINISHED, "stdout": "hé\n", "stderr": "w"})) as (url, asked):
        (outcome,) = ask(url, Program("cpp", "int main() {}", {"a": b"\0\xff"}), "x\u00e9".encode(), limits=limits)
    assert asked == [
        {
            "code": "int main() {}",
            "language": "cpp",
            "stdin": "x\u00e9",
            "compile_timeout": 60.0,
            "run_timeout": 7.5,
            "memory_limit_MB": 101,
            "files": {"a": base64.b64encode(b"\0\xff").decode()},
            "fetch_files": [],
        }
    ]
    assert outcome == Outcome(Verdict.OK, 0, "hé\n".encode(), b"w", 0.02, 0.0)


@pytest.mark.parametrize(
    ("answer", "verdict", "status"),
    [
        (said("Failed", {**FINISHED, "return_code": 3}), Verdict.CRASHED, 3),
        (said("Failed", {**FINISHED, "return_code": -11}), Verdict.CRASHED, 139),
        (said("Failed", {**FINISHED, "return_code": 1, "stderr": "MemoryError"}), Verdict.MEMORY, 1),
        (said("Failed", {**FINISHED, "status": "TimeLimitExceeded", "return_code": None}), Verdict.TIME, None),
        (said("Failed", None, {**FINISHED, "return_code": 1, "stderr": "no"}), Verdict.COMPILE, None),
        (said("Failed", None, {**FINISHED, "status": "TimeLimitExceeded", "return_code": None}), Verdict.COMPILE, None),
        (said("SandboxError", None, None, "no disk"), Verdict.FAILED, None),
        (said("Success", {**FINISHED, "stdout": "x" * 3000}), Verdict.OUTPUT, None),
        (said("Success", None), Verdict.FAILED, None),
        (said("Success", {**FINISHED, "status": "Error"}), Verdict.FAILED, None),
        ({"detail": "x"}, Verdict.FAILED, None),
        (["x"], Verdict.FAILED, None),
        (422, Verdict.FAILED, None),
    ],
)
def test_what_sandboxfusion_answers_is_a_verdict(answer: Any, verdict: Verdict, status: int | None) -> None:
    with fusion(answer) as (url, asked):
        (outcome,) = ask(url, ECHO, b"", limits=Limits(output_bytes=2000))
    assert (outcome.verdict, outcome.status) == (verdict, status), outcome
    assert len(asked) == 1 and len(outcome.stdout) <= 2000


def test_sandboxfusion_is_asked_again_after_504_and_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    with fusion(504, None, 429, said()) as (url, asked):
        (outcome,) = ask(url, ECHO, b"")
    assert outcome.verdict is Verdict.OK and len(asked) == 4
    with fusion(504, 504) as (url, asked):
        (outcome,) = ask(url, ECHO, b"", retries=1)
    assert outcome.verdict is Verdict.FAILED and len(asked) == 2 and b"HTTP 504" in outcome.stderr


def test_what_does_not_compile_is_sent_once_and_what_is_no_text_not_at_all() -> None:
    with fusion(said("Failed", None, {**FINISHED, "return_code": 1})) as (url, asked):
        assert len(ask(url, ECHO, b"1", b"2")) == 1 and len(asked) == 1
    with fusion() as (url, asked):
        (outcome,) = ask(url, ECHO, b"\xff")
    assert outcome.verdict is Verdict.FAILED and asked == []

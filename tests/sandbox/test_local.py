"""The sandbox of this machine: verdicts, limits, what a program finds, what is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_gspo.cli import main
from megatron_gspo.config import SandboxConfig
from megatron_gspo.config.sandbox import UNPROTECTED
from megatron_gspo.errors import ConfigError
from megatron_gspo.sandbox import Limits, Outcome, Program, Sandbox, Verdict, open_sandbox
from megatron_gspo.sandbox.languages import LANGUAGES
from megatron_gspo.sandbox.local import LocalSandbox
from tests.sandbox.cases import DISK_MB
from tests.sandbox.world import descendants, line_of, named, outlasting

pytestmark = pytest.mark.usefixtures("namespaces")
LIMITS = Limits(wall_s=20.0, cpu_s=5.0)
ECHO = "print(input()[::-1])"


def within(action: Callable[[LocalSandbox], Awaitable[object]], config: SandboxConfig | None = None) -> object:
    async def main() -> object:
        async with LocalSandbox(config or SandboxConfig(disk_mb=DISK_MB)) as sandbox:
            return await action(sandbox)

    return asyncio.run(main())


def run(
    program: Program, *inputs: bytes, limits: Limits = LIMITS, config: SandboxConfig | None = None
) -> list[Outcome]:
    return within(lambda sandbox: sandbox.run(program, inputs, limits), config)  # type: ignore[return-value]


def python(source: str, *inputs: bytes, limits: Limits = LIMITS, config: SandboxConfig | None = None) -> list[Outcome]:
    return run(Program("python", source), *(inputs or (b"",)), limits=limits, config=config)


def test_a_program_is_run_once_for_each_input_in_their_order() -> None:
    outcomes = python(ECHO, b"abc\n", b"\xc3\xa9t\xc3\xa9\n", b"")
    assert [outcome.stdout for outcome in outcomes] == [b"cba\n", b"\xc3\xa9t\xc3\xa9\n", b""]
    assert [outcome.verdict for outcome in outcomes] == [Verdict.OK, Verdict.OK, Verdict.CRASHED]
    assert [outcome.status for outcome in outcomes] == [0, 0, 1]
    assert b"EOFError" in outcomes[2].stderr


def test_it_stops_where_it_is_told_to() -> None:
    seen: list[tuple[int, bytes]] = []

    def go_on(index: int, outcome: Outcome) -> bool:
        seen.append((index, outcome.stdout))
        return index < 1

    inputs = [b"ab\n", b"cd\n", b"ef\n"]
    outcomes = within(lambda sandbox: sandbox.run(Program("python", ECHO), inputs, LIMITS, go_on=go_on))
    assert [outcome.stdout for outcome in outcomes] == [b"ba\n", b"dc\n"]  # type: ignore[attr-defined]
    assert seen == [(0, b"ba\n"), (1, b"dc\n")]


def test_a_run_sees_nothing_of_the_runs_before_it() -> None:
    source = (
        "import os\nprint(sorted(os.listdir('.')), os.listdir('/dev/shm'))\nopen('left', 'w')\nopen('/dev/shm/l', 'w')"
    )
    assert [outcome.stdout for outcome in python(source, b"", b"")] == [b"['main.py'] []\n"] * 2


def test_a_program_finds_its_files_and_cannot_change_them() -> None:
    source = "import helper\nprint(helper.N, open('data/a b.txt').read())\nopen('data/a b.txt', 'w')"
    program = Program("python", source, {"helper.py": b"N = 7", "data/a b.txt": b"hello", "zero": b""})
    (outcome,) = run(program, b"")
    assert (outcome.stdout, outcome.status) == (b"7 hello\n", 1)
    assert b"Read-only file system" in outcome.stderr


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "main.py", "./main.py", "a\0b", "a/", "\ud800"])
def test_names_that_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="file is called"):
        run(Program("python", "", {name: b""}), b"")


def test_a_language_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="no language 'cobol': there are python, cpp"):
        run(Program("cobol", ""), b"")


def test_cpp_is_compiled_once_and_run_for_each_input() -> None:
    source = '#include <cstdio>\nint main() { int a; if (scanf("%d", &a) != 1) return 3; printf("%d", a * a); }'
    outcomes = run(Program("cpp", source), b"3", b"-12", b"x")
    assert [(outcome.stdout, outcome.status) for outcome in outcomes] == [(b"9", 0), (b"144", 0), (b"", 3)]


def test_what_does_not_compile_is_one_outcome_with_the_compilers_words() -> None:
    outcomes = run(Program("cpp", "int main() { return wrong; }"), b"1", b"2")
    assert [outcome.verdict for outcome in outcomes] == [Verdict.COMPILE]
    assert b"wrong" in outcomes[0].stderr and outcomes[0].status is None
    assert [outcome.verdict for outcome in python("print('\ud800')", b"1", b"2")] == [Verdict.COMPILE]


@pytest.mark.parametrize(
    ("limits", "source", "verdict"),
    [
        ({"wall_s": 0.5}, "import time\ntime.sleep(60)", Verdict.TIME),
        ({"cpu_s": 0.5}, "while True: pass", Verdict.TIME),
        ({"memory_bytes": 64 << 20}, "a = bytearray(80 << 20)", Verdict.MEMORY),
        ({"memory_bytes": 96 << 20}, "a = bytearray(80 << 20)", Verdict.OK),
        ({"output_bytes": 10}, "print('x' * 9)", Verdict.OK),
        ({"output_bytes": 10}, "print('x' * 10)", Verdict.OUTPUT),
        ({"file_bytes": 1000}, "with open('a', 'w') as file: file.write('x' * 1001)", Verdict.CRASHED),
        ({"file_bytes": 1000}, "with open('a', 'w') as file: file.write('x' * 1000)", Verdict.OK),
        ({"processes": 3}, "import os\nfor _ in range(2): os.fork() or __import__('time').sleep(9)", Verdict.OK),
        ({"processes": 2}, "import os\nfor _ in range(2): os.fork() or __import__('time').sleep(9)", Verdict.CRASHED),
    ],
)  # fmt: skip
def test_a_limit_holds_and_gives_its_verdict(limits: dict[str, float], source: str, verdict: Verdict) -> None:
    (outcome,) = python(source, limits=replace(LIMITS, **limits))  # type: ignore[arg-type]
    assert outcome.verdict is verdict, outcome


def test_processor_time_is_that_of_all_processes_together() -> None:
    source = "import os\nfor _ in range(4):\n    if os.fork() == 0:\n        while True: pass\nos.wait()"
    (outcome,) = python(source, limits=replace(LIMITS, cpu_s=1.0))
    assert outcome.verdict is Verdict.TIME and outcome.status is None
    assert 1.0 <= outcome.cpu_s < 2.5, outcome


def test_time_in_the_queue_is_not_the_programs() -> None:
    config = SandboxConfig(concurrency=1)
    program = Program("python", "import time\ntime.sleep(0.4)")

    async def all_at_once(sandbox: Sandbox) -> list[list[Outcome]]:
        return await asyncio.gather(*(sandbox.run(program, [b""], LIMITS) for _ in range(5)))

    began = time.monotonic()
    outcomes = within(all_at_once, config)
    took = time.monotonic() - began
    assert took > 2.0, "one after the other"
    assert all(outcome.verdict is Verdict.OK for (outcome,) in outcomes)  # type: ignore[attr-defined]
    own = sum(outcome.wall_s for (outcome,) in outcomes)  # type: ignore[attr-defined]
    assert own < took, "three times as much if each had begun with the first"


def test_many_programs_at_once_each_get_what_is_theirs() -> None:
    async def many(sandbox: Sandbox) -> list[list[Outcome]]:
        ran = (sandbox.run(Program("python", f"print(int(input()) + {n})"), [b"%d" % n], LIMITS) for n in range(40))
        return await asyncio.gather(*ran)

    outcomes = within(many, SandboxConfig(concurrency=3))
    assert [outcome.stdout for (outcome,) in outcomes] == [b"%d\n" % (2 * n) for n in range(40)]  # type: ignore[attr-defined]


def test_a_run_that_is_given_up_is_ended_with_all_that_it_started() -> None:
    source = "import os, time\nos.fork(); os.fork()\ntime.sleep(600)"

    async def give_up(sandbox: Sandbox) -> tuple[int, list[str]]:
        task = asyncio.create_task(sandbox.run(Program("python", source), [b""], replace(LIMITS, wall_s=600.0)))
        while sum(named(process).startswith("python3") for process in descendants()) < 4:
            await asyncio.sleep(0.02)
        during = descendants()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left = outlasting(during)
        (outcome,) = await sandbox.run(Program("python", "print(1)"), [b""], LIMITS)
        return len(during), left if outcome.stdout == b"1\n" else [str(outcome)]

    began, left = within(give_up, SandboxConfig(concurrency=1))  # type: ignore[misc]
    assert began >= 6 and left == []


KILLED = """
import asyncio, sys
from megatron_gspo.config import SandboxConfig
from megatron_gspo.sandbox import Limits, Program, open_sandbox
async def main():
    async with open_sandbox(SandboxConfig(concurrency=2)) as sandbox:
        program = Program("python", "import os, time\\nos.setsid() if os.fork() == 0 else 0\\ntime.sleep(600)")
        print("ready", flush=True)
        await asyncio.gather(*(sandbox.run(program, [b""], Limits(wall_s=600)) for _ in range(2)))
asyncio.run(main())
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_trainer_that_is_killed_or_interrupted_leaves_no_process(by: signal.Signals) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert trainer.stdout is not None and trainer.stdout.readline() == b"ready\n"
    process = psutil.Process(trainer.pid)
    deadline = time.monotonic() + 120
    while len(process.children(recursive=True)) < 10 and time.monotonic() < deadline:
        time.sleep(0.02)
    started = process.children(recursive=True)
    assert len(started) >= 10, started
    trainer.send_signal(by)
    trainer.wait(120)
    trainer.stdout.close()
    assert outlasting(started) == []


def test_a_keeper_that_dies_is_a_failure_of_the_sandbox_and_the_next_run_has_another() -> None:
    async def lose(sandbox: Sandbox) -> list[Outcome]:
        sleeping = Program("python", "import sys, time\ntime.sleep(float(input()))")

        async def kill() -> None:
            while not (found := [p for p in descendants() if "sleep" in str(line_of(p)) or named(p) == "bwrap"]):
                await asyncio.sleep(0.02)
            keeper = found[0].parent()
            assert keeper is not None
            keeper.kill()

        killing = asyncio.create_task(kill())
        outcomes = await sandbox.run(sleeping, [b"30", b"0"], replace(LIMITS, wall_s=40.0))
        await killing
        return outcomes

    first, second = within(lose, SandboxConfig(concurrency=1))  # type: ignore[misc]
    assert first.verdict is Verdict.FAILED and first.status is None
    assert second.verdict is Verdict.OK
    assert descendants() == []


def test_a_sandbox_can_be_entered_again() -> None:
    sandbox = LocalSandbox(SandboxConfig())

    async def once() -> bytes:
        async with sandbox:
            return (await sandbox.run(Program("python", "print(1)"), [b""], LIMITS))[0].stdout

    assert [asyncio.run(once()) for _ in range(2)] == [b"1\n"] * 2
    assert descendants() == []


REFUSAL = (
    "No permissions to create new namespace, likely because the kernel does not allow non-privileged user namespaces."
)


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """A bwrap that does something else."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    script = tmp_path / "bwrap"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "bubblewrap $VERSION" || {{ {then}; }}\n'.replace("$VERSION", "0.8.0")
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_where_namespaces_are_not_allowed_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, f'echo "bwrap: {REFUSAL}" >&2; exit 1')
    with pytest.raises(ConfigError) as refused:
        python("print(1)")
    words = str(refused.value)
    assert REFUSAL in words and "\n" not in words
    for remedy in (
        "docker run --security-opt seccomp=unconfined",
        "kernel.apparmor_restrict_unprivileged_userns=0",
        "sandbox serve",
    ):
        assert remedy in words
    assert descendants() == []


def test_without_bubblewrap_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"apt-get install bubblewrap, or start `megatron-gspo sandbox serve`"):
        python("print(1)")


def test_an_old_bubblewrap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "exit 1")
    script = tmp_path / "bwrap"
    script.write_text(script.read_text().replace("0.8.0", "0.6.1"))
    with pytest.raises(ConfigError, match=r"bubblewrap 0\.6\.1: 0\.8 or newer is needed"):
        python("print(1)")


def test_a_bubblewrap_that_cannot_start_later_on_is_never_the_programs_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = tmp_path / "broken"
    stand_in(
        tmp_path,
        monkeypatch,
        f'[ -e {switch} ] && {{ echo "bwrap: No space left on device" >&2; exit 1; }} || exec /usr/bin/bwrap "$@"',
    )

    async def then_break(sandbox: Sandbox) -> list[Outcome]:
        switch.touch()
        return await sandbox.run(Program("python", "print(1)"), [b""], LIMITS)

    (outcome,) = within(then_break)  # type: ignore[misc]
    assert outcome.verdict is Verdict.FAILED and b"No space left" in outcome.stderr


def test_without_protection_limits_and_a_directory_of_its_own_hold_and_nothing_is_left() -> None:
    config = SandboxConfig(backend=UNPROTECTED)
    source = (
        "import os, time\nprint(os.getcwd(), os.listdir('.'), os.path.exists('/etc/passwd'), input())\nopen('x', 'w')"
    )
    outcomes = python(source, b"1", b"2", config=config)
    where = [outcome.stdout.split()[0].decode() for outcome in outcomes]
    assert [outcome.stdout.split()[1:] for outcome in outcomes] == [
        [b"['main.py']", b"True", b"1"],
        [b"['main.py']", b"True", b"2"],
    ]
    assert len(set(where)) == 2 and not any(map(os.path.exists, where))
    tight = replace(LIMITS, memory_bytes=96 << 20, output_bytes=1000)
    for program, wall_s, verdict in (
        ("import os, time\nos.fork(); os.setsid() if os.fork() == 0 else 0\ntime.sleep(60)", 1.0, Verdict.TIME),
        ("a = bytearray(1 << 30)", 20.0, Verdict.MEMORY),
        ("while True: print('x' * 100)", 20.0, Verdict.OUTPUT),
        ("import os\nos.kill(os.getpid(), 11)", 20.0, Verdict.CRASHED),
    ):
        (outcome,) = python(program, config=config, limits=replace(tight, wall_s=wall_s))
        assert outcome.verdict is verdict, outcome
    assert descendants() == []


def test_started_as_root_a_program_is_another_user() -> None:
    if os.geteuid() != 0:
        pytest.skip("not root")
    (outcome,) = python("import os\nprint(os.getuid(), os.getgroups())", config=SandboxConfig(backend=UNPROTECTED))
    uid, groups = outcome.stdout.decode().split(maxsplit=1)
    assert int(uid) > 60000 and groups.strip() == "[]"


@pytest.mark.usefixtures("namespaces")
def test_a_program_cannot_write_to_the_memory_of_what_started_it() -> None:
    (outcome,) = python(
        "import os\nfor path in ('/proc/1/mem', '/proc/1/task/1/mem', '/proc/self/root/proc/1/task/1/mem'):\n"
        "    try:\n        os.open(path, os.O_RDWR)\n    except OSError:\n        continue\n    print(path)\n"
        "assert os.open('/proc/self/mem', os.O_RDWR) > 0"
    )
    assert (outcome.verdict, outcome.stdout) == (Verdict.OK, b""), outcome


def test_an_open_sandbox_is_the_one_that_the_configuration_names() -> None:
    names = {
        "bubblewrap": SandboxConfig(),
        UNPROTECTED: SandboxConfig(backend=UNPROTECTED),
        "server": SandboxConfig(backend="server", servers=("http://a:1",), key_file="k"),
        "sandboxfusion": SandboxConfig(backend="sandboxfusion", servers=("http://a:1",)),
    }
    kinds = {name: type(open_sandbox(config)).__name__ for name, config in names.items()}
    assert kinds == {
        "bubblewrap": "LocalSandbox",
        UNPROTECTED: "LocalSandbox",
        "server": "ServerSandbox",
        "sandboxfusion": "FusionSandbox",
    }


def test_a_python_that_is_named_brings_its_packages() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        where = Path(directory) / "environment"
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(where)], check=True)
        (packages,) = where.glob("lib/python3*/site-packages")
        (packages / "of_ours.py").write_text("N = 11")
        config = SandboxConfig(python=str(where / "bin" / "python"))
        (outcome,) = python("import of_ours, sys\nprint(of_ours.N, sys.prefix)", config=config)
    assert outcome.stdout.decode() == f"11 {where}\n"


def test_a_python_that_is_none_or_that_other_users_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no Python that runs"):
        python("", config=SandboxConfig(python=str(tmp_path / "python")))
    if os.geteuid() == 0:
        hidden = tmp_path / "hidden"
        hidden.mkdir(mode=0o700)
        (hidden / "python").symlink_to("/usr/bin/python3")
        with pytest.raises(ConfigError, match="only its owner reads"):
            python("", config=SandboxConfig(python=str(hidden / "python")))


def test_check_runs_a_program_of_every_language(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(LANGUAGES["cpp"], sample="int main() { return 3; }")
    monkeypatch.setitem(LANGUAGES, "cpp", wrong)  # here, not in the process that runs it
    assert main(["sandbox", "check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "python: works" and lines[-1].startswith("cpp: crashed, status 3")


def test_the_page_s_program_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/sandbox.md").read_text("utf-8")
    exec(compile(page.split("```python\n")[1].split("```")[0], "docs/sandbox.md", "exec"), {})
    assert capsys.readouterr().out.count("verdict=<Verdict.OK") == 2

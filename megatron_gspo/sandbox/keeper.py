"""A process that runs programs for a sandbox, one at a time, and leaves nothing of them.

It is small and has one thread, so that starting a program does not copy the trainer's page tables, and another user
where it was started as root. It ends with its client: the kernel closes the client's end of their connection, however
the client ends. Standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gspo.sandbox import box, seccomp, wire
from megatron_gspo.sandbox.interface import Limits, Outcome, Verdict
from megatron_gspo.sandbox.languages import COMPILE, HEADERS, HOME, LANGUAGES, Language
from megatron_gspo.sandbox.running import ClientGoneError, Run, Start

_SET_DUMPABLE, _SET_CHILD_SUBREAPER = 4, 36
"""Of prctl(2)."""
READY = {"ready": True}


@dataclass
class Loaded:
    """A program that can be run."""

    language: Language
    limits: Limits
    files: dict[str, int] = field(default_factory=dict)
    """Name -> a file in memory."""

    def close(self) -> None:
        """Forgets it."""
        for fd in self.files.values():
            os.close(fd)
        self.files.clear()


class Keeper:
    """Answers one client."""

    def __init__(self, settings: box.Settings, control: socket.socket, headers: int) -> None:
        """``headers``: a file in memory, which holds the precompiled header once the client has one."""
        self._settings, self._control, self._headers = settings, control, headers
        self._loaded: Loaded | None = None
        self._own_header = -1
        self._seccomp = in_memory(seccomp.filter_for()) if settings.protected else -1
        self._nothing = os.open(os.devnull, os.O_RDONLY)

    def serve(self) -> None:
        """Until the client goes. A message loads a program, or runs the one that is loaded."""
        with contextlib.suppress(ClientGoneError, ConnectionError):
            while (message := receive(self._control)) is not None:
                self._control.sendall(self._answer(message))

    def _answer(self, message: wire.Message) -> bytes:
        header, blobs = message
        try:
            if "language" in header:
                refused = self._load(*wire.to_program(message), precompiled=header.get("precompiled", False))
                return wire.pack(READY) if refused is None else wire.of_outcome(refused)
            if "header" in header:
                return wire.of_outcome(self._precompile(LANGUAGES[header["header"]]))
            return wire.of_outcome(self._run(blobs[0]))
        except (OSError, ValueError) as error:  # no room, no process: this machine's trouble
            words = f"{type(error).__name__}: {error}".encode()
            return wire.of_outcome(Outcome(Verdict.FAILED, None, b"", words, 0.0, 0.0))

    def _load(
        self, name: str, source: bytes, files: Mapping[str, bytes], limits: Limits, *, precompiled: bool
    ) -> Outcome | None:
        """Makes a program ready; the outcome of compiling where it does not."""
        if self._loaded is not None:
            self._loaded.close()
        language = LANGUAGES[name]
        self._loaded = Loaded(language, limits)
        text = in_memory(source)
        for file, content in files.items():
            self._loaded.files[file] = in_memory(content)
        if not language.compile:
            self._loaded.files[language.file] = text
            return None
        with _closing(text):
            given = {language.file: text, **self._loaded.files}
            headers = {f"{HEADERS}/{language.precompiled}": self._header()} if precompiled else {}
            compiled = self._compile(language, f"{language.compile} >&2 && exec cat {language.binary}", given, headers)
        if compiled.verdict is Verdict.OK:
            self._loaded.files[language.binary] = in_memory(compiled.stdout)
            return None
        verdict = Verdict.FAILED if compiled.verdict is Verdict.FAILED else Verdict.COMPILE
        return Outcome(verdict, None, b"", compiled.stderr[: limits.output_bytes], compiled.wall_s, compiled.cpu_s)

    def _header(self) -> int:
        """The precompiled header, at a place of this keeper's own: others read the same file."""
        if self._own_header < 0:
            self._own_header = reopened(self._headers)
        return self._own_header

    def _precompile(self, language: Language) -> Outcome:
        """Standard output is the header."""
        return self._compile(language, f"{{ {language.header}; }} >&2 && exec cat all.gch", {}, {})

    def _compile(
        self, language: Language, command: str, files: Mapping[str, int], headers: Mapping[str, int]
    ) -> Outcome:
        shell = ("/bin/sh", "-c", command)
        found = {**{f"{HOME}/{name}": fd for name, fd in files.items()}, **headers}
        return self._start(language, shell, found, self._nothing, COMPILE, disk_bytes=COMPILE.file_bytes)

    def _run(self, given: bytes) -> Outcome:
        """A run of the loaded program. Its input is a sealed file in memory: nothing has to be pumped."""
        if self._loaded is None:
            raise ValueError("no program is loaded")
        loaded, disk = self._loaded, self._settings.disk_bytes
        command = tuple(word.replace("{python}", self._settings.python) for word in loaded.language.run)
        found = {f"{HOME}/{name}": fd for name, fd in loaded.files.items()}
        with _closing(in_memory(given)) as stdin:
            return self._start(loaded.language, command, found, stdin, loaded.limits, disk_bytes=disk)

    def _start(
        self,
        language: Language,
        command: tuple[str, ...],
        files: Mapping[str, int],
        stdin: int,
        limits: Limits,
        *,
        disk_bytes: int,
    ) -> Outcome:
        behind = box.limited(command, limits, language.stack_bytes, count=self._settings.count_by_kernel)
        binary = f"{HOME}/{language.binary}" if language.binary else ""
        found = [box.File(path, fd, path == binary) for path, fd in files.items()]
        if not self._settings.protected:
            return self._unprotected(language, behind, found, stdin, limits)
        status, status_end = os.pipe()
        os.set_blocking(status, False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_closing(status))
            with _closing(status_end), _inherited(status_end, self._seccomp, *files.values()):
                line = box.boxed(
                    self._settings, behind, found, status=status_end, seccomp=self._seccomp, disk_bytes=disk_bytes
                )
                run = Run(Start(line, box.environment(language), stdin, status), limits, self._control)
            return run.outcome(language)

    def _unprotected(
        self, language: Language, command: list[str], files: list[box.File], stdin: int, limits: Limits
    ) -> Outcome:
        """In a directory of its own, which is where ``HOME`` is otherwise."""
        home = tempfile.mkdtemp(prefix="megatron-gspo-unprotected-")
        try:
            for file in files:
                path = Path(file.path.replace(HOME, home, 1) if file.path.startswith(HOME) else home + file.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(os.pread(file.fd, os.fstat(file.fd).st_size, 0))
                path.chmod(0o555 if file.executable else 0o444)
            there = [word.replace(f"{HOME}/", f"{home}/").replace(HEADERS, home + HEADERS) for word in command]
            environment = {name: value.replace(HOME, home) for name, value in box.environment(language).items()}
            environment["TMPDIR"] = home
            line = ["/usr/bin/env", "-C", home, *there]
            return Run(Start(line, environment, stdin, None), limits, self._control).outcome(language)
        finally:
            shutil.rmtree(home, ignore_errors=True)


def in_memory(content: bytes) -> int:
    """A file in memory that nobody can change any more, at its beginning."""
    fd = os.memfd_create("program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def reopened(fd: int) -> int:
    """The same file for reading alone, from its beginning."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)


def receive(control: socket.socket) -> wire.Message | None:
    """The next message; None where the client has gone. Raises ClientGoneError where it goes in the middle of one."""
    prefix = _take(control, wire.PREFIX.size)
    if not prefix:
        return None
    header = json.loads(_take(control, wire.PREFIX.unpack(prefix)[0]))
    return header, [_take(control, size) for size in header["sizes"]]


def _take(control: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size and (part := control.recv(min(size - len(parts), 2**20))):
        parts += part
    if len(parts) < size and (parts or size != wire.PREFIX.size):
        raise ClientGoneError
    return bytes(parts)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _inherited(*fds: int) -> Iterator[None]:
    """What is started has these descriptors, each at its beginning."""
    for fd in fds:
        os.set_inheritable(fd, True)
        with contextlib.suppress(OSError):  # a pipe
            os.lseek(fd, 0, os.SEEK_SET)
    try:
        yield
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)


def become(uid: int | None) -> None:
    """Becomes another user for good, and whoever orphans are given to."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self is root's after such a change
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with contextlib.suppress(OSError):  # a machine without memory ends programs before anything else
        Path("/proc/self/oom_score_adj").write_bytes(b"900")


def main(control: int, headers: int) -> None:
    """A keeper's process: ``control`` and ``headers`` are descriptors that its client has left it."""
    for fd in (control, headers):  # inherited from the client: a program that had them could answer for its keeper
        os.set_inheritable(fd, False)
    with socket.socket(fileno=control) as client, contextlib.suppress(ClientGoneError):
        if (message := receive(client)) is None:
            return
        given = message[0]
        settings = box.Settings(**{name: given[name] for name in box.Settings.__dataclass_fields__})
        become(settings.uid)
        Keeper(settings, client, headers).serve()

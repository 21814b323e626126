"""Programs that take: processes, memory, disks, output, time."""

from __future__ import annotations

from tests.sandbox.cases import CRASHED, LIMITS, MEMORY, OK, OUTPUT, TIME, Case, case, denied, each


def cases() -> list[Case]:
    """All of them."""
    return [*processes(), *memory(), *disks(), *output(), *time()]


def processes() -> list[Case]:
    """Fork bombs, threads, zombies, daemons."""
    many = LIMITS.processes
    counted = """
        import os, time
        made = 0
        try:
            while made < 500:
                if os.fork() == 0:
                    time.sleep(30)
                    os._exit(0)
                made += 1
        except OSError:
            pass
        print(made)
    """
    threads = """
        import threading, time
        threading.stack_size(65536)
        made = 0
        try:
            while made < 500:
                threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
                made += 1
        except RuntimeError:
            pass
        print(made, flush=True)
        import os
        os._exit(0)
    """
    daemon = """
        import os, time
        for _ in range(@):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(100)
                os._exit(0)
        print('left')
    """
    return [
        case("fork bomb/plain", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", TIME),
        case("fork bomb/counted", counted, OK, says=f"{many - 1}\n"),
        case("fork bomb/shell", "import os\nos.system(':(){ :|:& };:')\nwhile True: pass", TIME),
        case("fork bomb/execs", "import os, sys\nos.fork(); os.fork(); os.execv(sys.executable, [sys.executable, __file__])",
             TIME, OK, CRASHED),
        case("threads/counted", threads, OK, says=f"{many - 1}\n"),
        case("threads/each forks", "import os, threading\ndef f():\n    while True:\n        try: os.fork()\n"
             "        except OSError: pass\nfor _ in range(4):\n    try: threading.Thread(target=f).start()\n"
             "    except RuntimeError: pass", TIME),
        *each("zombies", "import os, time\nfor _ in range(@):\n    os.fork() or os._exit(0)\nprint('left')", range(2, 12),
              OK, says="left\n"),
        *each("daemons", daemon, range(1, 7), OK, says="left\n"),
        *each("pipe kept open", "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(@)\nprint('left', flush=True)\n"
              "os._exit(0)", (5, 50, 500, 5000), OK, says="left\n"),
        *each("pipe written after the end", "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: os.write(1, b'x' * @)\n"
              "os._exit(0)", (1, 10, 1000), OK, OUTPUT),
    ]  # fmt: skip


def memory() -> list[Case]:
    """More than there is for them."""
    forks = """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                block = bytearray(b'x') * (@ << 20)
                time.sleep(30)
        time.sleep(30)
    """
    shared = """
        import mmap, os, time
        for _ in range(6):
            if os.fork() == 0:
                area = mmap.mmap(-1, @ << 20)
                for at in range(0, len(area), 4096):
                    area[at] = 1
                time.sleep(30)
        time.sleep(30)
    """
    return [
        *each("memory/bytearray", "a = bytearray(@)", (2**28, 2**30, 2**31, 2**33, 2**40), MEMORY),
        *each("memory/touched", "a = b'x' * @", (2**28, 2**31, 2**34), MEMORY),
        *each("memory/list", "a = [0] * @", (2**26, 2**28, 2**31, 2**35), MEMORY),
        *each("memory/grown", "a = []\nwhile True: a.append(bytearray(@))", (1000, 2**16, 2**20, 2**24), MEMORY, TIME),
        *each("memory/integer", "a = 1 << (@ << 33)", (1, 2, 8), MEMORY),
        *each("memory/text", "a = 'x' * @\nwhile True: a += a", (1, 1000, 10**6), MEMORY),
        *each("memory/of forks", forks, (25, 40, 60, 100), MEMORY),
        *each("memory/shared by nobody", shared, (40, 80, 120), MEMORY),
        case("memory/dictionary", "a = {}\nwhile True: a[len(a)] = str(len(a))", MEMORY, TIME),
        case("memory/recursion", "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)", MEMORY, CRASHED, TIME),
        case("memory/regex", "import re\nre.match('(a*)*b', 'a' * 40)", TIME),
        case("memory/power", "print(len(str(9 ** 9 ** 9)))", TIME, MEMORY),
        case("memory/unpickled", "import pickle\npickle.loads(b'\\x8e' + (2**40).to_bytes(8, 'little'))", CRASHED, MEMORY),
        case("memory/compiled", "compile('(' * 100 + ')' * 99 + '+' * 10**7, '', 'eval')", CRASHED, MEMORY),
        *denied("memory of no file", "", [
            "libc.memfd_create(b'x', 0)", "libc.shmget(0, 2**30, 0o1600)", "libc.syscall(447, 0)", "libc.mlockall(3)",
            "os.memfd_create('x')", "libc.msgget(0, 0o1600)",
        ]),
    ]  # fmt: skip


def disks() -> list[Case]:
    """Full disks, sparse files, names without end."""
    full = """
        import os
        written = 0
        try:
            for index in range(10**6):
                with open(f'@/{index}', 'wb') as file:
                    written += file.write(b'x' * (1 << 20))
        except OSError as error:
            print(error.errno, written >> 20 <= 16)
    """
    inodes = "import os\nfor n in range(10**7):\n    @"
    kinds = ["open(str(n), 'w').close()", "os.mkdir(str(n))", "os.symlink('x', str(n))", "os.mkfifo(str(n))",
             "os.link(__file__, str(n))", "os.mkdir('d'); os.chdir('d')", "open('x' * 200 + str(n), 'w').close()"]  # fmt: skip
    return [
        *(case(f"disk/full {where}", full.replace("@", where), OK, says="28 True\n") for where in ("/box", "/tmp", "/dev/shm")),
        *each("disk/sparse", "f = open('a', 'wb')\ntry:\n    f.truncate(@)\nexcept OSError as error:\n    print(error.errno)",
              (2**23, 2**30, 2**40, 2**60), OK, says="27\n"),
        *each("disk/sought", "f = open('a', 'wb', 0)\nf.seek(@)\ntry:\n    f.write(b'x')\nexcept OSError as error:\n    print(error.errno)",
              (2**23, 2**30, 2**40), OK, says="27\n"),
        *each("disk/one file", "f = open('a', 'wb', 0)\ntry:\n    while True: f.write(b'x' * @)\nexcept OSError as error:\n"
              "    print(error.errno)", (4096, 2**20), OK, says="27\n"),
        *(case(f"disk/inodes {kind}", inodes.replace("@", kind), MEMORY, TIME, CRASHED) for kind in kinds),
        *each("disk/long names", "try:\n    open('x' * @, 'w')\nexcept OSError as error:\n    print(error.errno)",
              (256, 1000, 5000), OK, says="36\n"),
        case("disk/mapped", "import mmap, os\nfd = os.open('/dev/shm/a', os.O_RDWR | os.O_CREAT)\nos.ftruncate(fd, 4 << 20)\n"
             "m = mmap.mmap(fd, 4 << 20)\nm[:] = b'x' * len(m)\nprint('held')", OK, says="held\n"),
        case("descriptors", "import os\nn = 0\ntry:\n    while True: os.dup(0); n += 1\nexcept OSError as error: print(error.errno, n)",
             OK, says="24 125\n"),
        case("pipes", "import os, fcntl\nn = 0\ntry:\n    while True:\n        r, w = os.pipe(); os.set_blocking(w, False)\n        try:\n"
             "            while True: os.write(w, b'x' * 4096)\n        except BlockingIOError: n += 1\n"
             "except OSError as error: print(error.errno)", OK, says="24\n"),
    ]  # fmt: skip


def output() -> list[Case]:
    """Output without end."""
    return [
        *each("output/stdout", "while True: print('x' * @)", (1, 100, 65536, 10**6), OUTPUT),
        *each("output/stderr", "import sys\nwhile True: sys.stderr.write('x' * @)", (1, 100, 65536), OUTPUT),
        *each("output/one write", "import os\nos.write(1, b'x' * @)", (65537, 10**6, 10**7), OUTPUT),
        *each("output/just enough", "import sys\nsys.stdout.write('x' * 65536)\nsys.stderr.write('y' * @)", (65535, 65536), OK),
        *each("output/of children", "import os\nfor _ in range(@): os.fork()\nwhile True: os.write(1, b'x' * 999)", (1, 2, 3), OUTPUT),
        case("output/zeros", "import os\nos.system('cat /dev/zero')", OUTPUT),
        case("output/yes", "import os\nos.execvp('yes', ['yes'])", OUTPUT),
        case("output/random", "import os\nos.system('cat /dev/urandom >&2')", OUTPUT),
        case("output/bytes that are no text", "import os\nos.write(1, bytes(range(256)))", OK, says=bytes(range(256))),
        case("output/zero bytes", "print('\\0' * 5, end='')", OK, says=b"\0" * 5),
        case("output/closed", "import os\nos.close(1); os.close(2); os.close(0)", OK, says=b""),
        case("output/traceback", "raise Exception('x' * 10**6)", OUTPUT),
    ]  # fmt: skip


def time() -> list[Case]:
    """Time without end."""
    deaf = "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    return [
        case("time/loop", "while True: pass", TIME),
        case("time/sleep", "import time\ntime.sleep(1000)", TIME),
        case("time/deaf loop", deaf + "while True: pass", TIME),
        case("time/deaf sleep", deaf + "import time\ntime.sleep(1000)", TIME),
        case("time/stopped", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", TIME),
        case("time/stopped by a child", "import os, signal, time\nif os.fork() == 0: os.kill(os.getppid(), 19); os._exit(0)\ntime.sleep(99)", TIME),
        case("time/lock", "import threading\nl = threading.Lock(); l.acquire(); l.acquire()", TIME),
        case("time/pipe", "import os\nr, w = os.pipe(); os.read(r, 1)", TIME),
        case("time/vfork", "import os\nos.posix_spawn('/bin/sleep', ['sleep', '99'], {}); os.wait()", TIME),
        case("time/of children", "import os\nfor _ in range(3): os.fork()\nwhile True: pass", TIME),
        case("time/short children", "import os\nwhile True:\n    if os.fork() == 0:\n        sum(range(10**5)); os._exit(0)\n    os.wait()", TIME),
        case("time/rearmed", "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (999, 999))\nexcept ValueError: pass\nwhile True: pass", TIME),
        case("time/exec loop", "import os, sys\nos.execv(sys.executable, [sys.executable, __file__])", TIME),
        case("time/nice", "import os\nos.nice(19)\nwhile True: pass", TIME),
        *denied("limits raised", "", [
            *(f"resource.setrlimit(resource.{name}, (-1, -1)) or 'set'" for name in
              ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_MEMLOCK")),
            "os.nice(-5)", "os.setpriority(os.PRIO_PROCESS, 0, -10) or 'set'",
            "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) or 'set'",
        ]),
    ]  # fmt: skip

"""Programs that reach out: files, network, other processes, the kernel, results that are not theirs."""

from __future__ import annotations

import signal

from megatron_gspo.sandbox.seccomp import CALLS
from tests.sandbox.cases import CRASHED, HOME, OK, SECRET, TIME, Case, case, denied, each

PATHS = (
    *("/etc/passwd", "/etc/shadow", "/etc/hosts", "/etc/resolv.conf", "/etc/ssh", "/etc/hostname", "/etc/machine-id"),
    *(
        HOME,
        f"{HOME}/.ssh",
        f"{HOME}/.profile",
        "/home",
        "/var",
        "/var/log",
        "/var/run",
        "/run",
        "/run/docker.sock",
    ),
    *("/sys", "/sys/fs/cgroup", "/sys/kernel", "/boot", "/opt", "/srv", "/mnt", "/media", "/usr/local", "/usr/share"),
    *(
        "/dev/mem",
        "/dev/kmsg",
        "/dev/sda",
        "/dev/vda",
        "/dev/kvm",
        "/dev/fuse",
        "/dev/vsock",
        "/dev/net/tun",
        "/dev/port",
    ),
    *("/dev/nvidia0", "/dev/nvidiactl", "/dev/dri", "/dev/loop-control", "/dev/input", "/newroot", "/oldroot"),
    *(
        "/proc/1/root/etc",
        "/proc/1/cwd/etc",
        "/proc/self/root/etc/passwd",
        "/proc/self/cwd/../etc/passwd",
        "/../../../etc",
    ),
    *("/proc/1/environ/x", "/proc/9999", "/proc/self/root/root", "/box/../root", "/tmp/../etc/passwd", "@CANARY@"),
    *("@CANARY@/secret", "/proc/self/root@CANARY@", "/proc/1/root@CANARY@/secret", "/dev/fd/../../etc/passwd"),
)
"""What is there outside, or may be, and not inside. ``@CANARY@``: a directory of the test's."""
READ_ONLY = (
    *("/usr/bin/python3", "/usr/bin/new", "/usr/lib/new", "/bin/sh", "/lib/new", "/new", "/dev/new", "/box/main.py"),
    *("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger"),
    *(
        "/proc/sys/kernel/pid_max",
        "/proc/sys/fs/file-max",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/net/ipv4/ip_forward",
    ),
    *("/proc/1/mem", "/proc/1/oom_score_adj", "/proc/1/setgroups", "/proc/1/uid_map", "/proc/self/uid_map"),
    *(
        "/proc/irq/default_smp_affinity",
        "/proc/1/clear_refs",
        "/proc/self/fd/0",
        "/proc/1/comm",
        "/proc/1/timerslack_ns",
    ),
)
NETWORK = (
    *("127.0.0.1:22", "127.0.0.1:@PORT@", "10.0.0.1:80", "192.168.0.1:80", "172.17.0.1:2375", "169.254.169.254:80"),
    *("1.1.1.1:53", "8.8.8.8:443", "0.0.0.0:@PORT@", "255.255.255.255:9", "224.0.0.1:5353", "100.64.0.1:80"),
)
SETUID = (
    "su",
    "sudo",
    "mount",
    "umount",
    "passwd",
    "chsh",
    "chfn",
    "newgrp",
    "gpasswd",
    "pkexec",
    "ping",
    "fusermount3",
    "newuidmap",
    "at",
)
NAMESPACES = {
    "ns": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}


def cases() -> list[Case]:
    """All of them."""
    return [*files(), *network(), *signals(), *kernel(), *results(), *environment(), *calls()]


def files() -> list[Case]:
    """Reads and writes outside, straight and through links."""
    read = "import os\nprint(os.path.lexists(@), os.path.exists(@))"
    link = "import os\nos.symlink(@, 'link')\ntry:\n    print(os.listdir('link') if os.path.isdir('link') else open('link').read())\nexcept OSError: print('failed')"
    written = "import os\nfor how in ('r+', 'a', 'w'):\n    try:\n        with open(@, how) as file: file.write('x')\n    except (OSError, ValueError): print('failed')"
    linked = "import os\nos.symlink(@, 'link')\ntry:\n    with open('link', 'a') as file: file.write('x')\nexcept (OSError, ValueError): print('failed')"
    walk = f"""
        import os
        found = []
        for directory, _, names in os.walk('/'):
            if directory.startswith(('/usr', '/proc', '/dev')): continue
            found += [os.path.join(directory, name) for name in names]
        print(sorted(found), {SECRET!r} in str(os.environ))
    """.replace(repr(SECRET), "'canary' + '-7d1f'")
    moved = "import os\ntry:\n    @\n    print('DONE')\nexcept OSError: print('failed')"
    moves = ["os.remove('/box/main.py')", "os.rename('/box/main.py', '/box/other')", "os.rmdir('/usr')", "os.rmdir('/box')",
             "os.mknod('/box/sda', 0o60660, os.makedev(8, 0))", "os.mknod('/box/mem', 0o20660, os.makedev(1, 1))",
             "os.chown('/box', 0, 0)", "os.link('/usr/bin/su', '/box/su')", "os.link('/usr/bin/python3', '/box/python')",
             "os.chmod('/usr/bin/sh', 0o777)", "os.utime('/usr/bin/sh')", "os.chroot('/box')", "os.setxattr('/box', 'trusted.x', b'')"]  # fmt: skip
    return [
        *each("absent", read, PATHS, OK, says="False False\n"),
        *each("through a link", link, PATHS, OK, says="failed\n"),
        *each("read-only", written, READ_ONLY, OK, says="failed\nfailed\nfailed\n"),
        *each("written through a link", linked, [*READ_ONLY[:12], *PATHS[:12]], OK, says="failed\n"),
        *(case(f"moved/{move}"[:80], moved.replace("@", move), OK, says="failed\n") for move in moves),
        case("walk", walk, OK, says="['/box/main.py'] False\n"),
        case("setuid bit", "import os, shutil\nshutil.copy('/usr/bin/id', 'id'); os.chmod('id', 0o6755)\nprint(os.popen('./id -u').read())",
             OK, says="65534\n\n"),
    ]  # fmt: skip


def network() -> list[Case]:
    """Sockets of all kinds."""
    connect = """
        import socket
        host, port = @.split(':')
        s = socket.socket(socket.AF_INET, socket.@KIND@)
        s.settimeout(1)
        try:
            s.connect((host, int(port))); s.send(b'x'); print(s.recv(99))
        except OSError: print('failed')
    """
    return [
        *(found for kind in ("SOCK_STREAM", "SOCK_DGRAM") for found in each(f"connect {kind}", connect.replace("@KIND@", kind), NETWORK, OK, says="failed\n")),
        *denied("socket", "", [f"socket.socket({family}, {kind})" for family in (3, 4, 5, 9, 11, 15, 16, 17, 26, 29, 31, 38, 40, 44) for kind in (1, 3)]),
        *denied("raw socket", "", [f"socket.socket({family}, 3, {protocol})" for family in (2, 10) for protocol in (1, 6, 17, 58, 255)]),
        *denied("named socket", "s = socket.socket(socket.AF_UNIX); s.settimeout(1)", [f"s.connect({path!r})" for path in
                ("/run/docker.sock", "/var/run/docker.sock", "/run/dbus/system_bus_socket", "/run/systemd/private", "/tmp/.X11-unix/X0",
                 "\0@CANARY@", "\0/tmp/.X11-unix/X0", "/dev/log")]),
        *denied("resolve", "", [f"socket.getaddrinfo({name!r}, 80)" for name in ("example.com", "metadata.google.internal", "host.docker.internal")]),
        *denied("interface", "s = socket.socket(); i = struct.pack('16sh14x', b'lo', 0)", ["fcntl.ioctl(s, 0x8914, i)", "s.setsockopt(1, 25, b'eth0')",
                "s.setsockopt(0, 19, 1)", "s.bind(('10.1.2.3', 80))", "s.bind(('127.0.0.1', 80))"]),
        case("listening to itself", "import socket\ns = socket.create_server(('', 0))\nprint('listens')", OK, says="listens\n"),
    ]  # fmt: skip


def signals() -> list[Case]:
    """To itself, to its parents, to everybody."""
    fatal = [n for n in range(1, 65) if n not in {17, 18, 19, 20, 21, 22, 23, 25, 28, 32, 33, 13, 2}]
    itself = "import os, signal\ntry: signal.signal(@, signal.SIG_DFL)\nexcept (OSError, ValueError): pass\nos.kill(os.getpid(), @)"
    others = "import os\nfor pid in @:\n    try: os.kill(pid, 9)\n    except OSError: pass\nprint('alive')"
    return [
        *(case(f"signal/{n}", itself.replace("@", str(n)), CRASHED, status=128 + n) for n in fatal),
        *(case(f"signal/ignored {n}", itself.replace("@", str(n)), OK) for n in (17, 18, 23, 28)),
        *(case(f"signal/stop {n}", itself.replace("@", str(n)), TIME) for n in (19,)),
        *(case(f"signal/first process {n}", f"import os\nos.kill(1, {n})\nprint('alive')", OK, says="alive\n") for n in range(1, 65) if n not in (32, 33)),
        case("signal/everybody", "import os\nos.kill(-1, 9)\nprint('alive')", OK, CRASHED),
        case("signal/everybody stops", "import os\nos.kill(-1, 19)\nprint('alive')", OK, TIME, CRASHED),
        case("signal/group", "import os\nos.killpg(0, 9)", CRASHED, status=137),
        case("signal/parent", "import os\nos.kill(os.getppid(), 9)\nprint(os.getppid())", OK, says="1\n"),
        *(case(f"signal/pids from {start}", others.replace("@", f"[n for n in range({start}, {start + 2000}) if n != os.getpid()]"),
               OK, says="alive\n") for start in (2, 2000, 4000, 30000)),
        *denied("queued", "", [f"libc.sigqueue({pid}, 9, None) if {pid} else -1" for pid in (3, 100, 1000, 31000)]),
    ]  # fmt: skip


def kernel() -> list[Case]:
    """Namespaces, mounts, tracing, terminals, the machine's own settings."""
    become = "import os\ntry: os.set@(0); print('DONE')\nexcept OSError: print('failed')"
    ran = "import subprocess\ntry:\n    d = subprocess.run([@, '-c', 'id -u'], capture_output=True, stdin=subprocess.DEVNULL, timeout=2)\n    print(b'0\\n' == d.stdout)\nexcept (OSError, subprocess.SubprocessError): print(False)"
    mounts = [("b'tmpfs'", "b'/box'", "b'tmpfs'", 0), ("b'proc'", "b'/box'", "b'proc'", 0), ("b'/'", "b'/box'", "None", 4096), ("None", "b'/'", "None", 32),
              ("None", "b'/usr/bin'", "None", 4128), ("b'sysfs'", "b'/box'", "b'sysfs'", 0), ("b'/dev/vda'", "b'/box'", "b'ext4'", 0), ("b'o'", "b'/box'", "b'overlay'", 0)]  # fmt: skip
    return [
        *denied("unshare", "", [f"libc.unshare({flag})" for flag in (*NAMESPACES.values(), 0x7E020000, 0x10020000, 0x80)]),
        *denied("clone", "", [f"libc.syscall(56, {flag} | 17, 0, 0, 0, 0)" for flag in (*NAMESPACES.values(), 0x7E020000)]),
        *denied("clone3", "", [f"libc.syscall(435, struct.pack('Q80x', {flag}), 88)" for flag in (*NAMESPACES.values(), 0)]),
        *denied("setns", "fd = os.open('/proc/1/ns/user', os.O_RDONLY) if os.path.exists('/proc/1/ns/user') else 0", ["libc.setns(fd, 0)"]),
        *denied("mount", "", [f"libc.mount({s}, {t}, {k}, {f}, None)" for s, t, k, f in mounts]),
        *denied("umount", "", [f"libc.umount2({path!r}, {flag})" for path in (b"/proc", b"/box", b"/", b"/usr/bin", b"/box/main.py") for flag in (0, 2)]),
        *denied("trace", "", [f"libc.ptrace({request}, {pid}, 0, 0)" for request in (0, 16, 0x4206) for pid in (1, 2, 3)]),
        *denied("other's memory", "b = ctypes.create_string_buffer(99)", [
            "libc.process_vm_readv(1, b, 1, b, 1, 0)", "libc.process_vm_writev(1, b, 1, b, 1, 0)", "len(open('/proc/1/mem', 'rb').read(1))",
            "libc.syscall(438, 3, 0, 0)", "libc.syscall(312, 1, 2, 0, 0, 0)", "len(open('/proc/kcore', 'rb').read(1))",
            "len(open('/proc/1/environ', 'rb').read()) - 1 if os.path.exists('/etc') else -1"]),
        *denied("machine", "", ["socket.sethostname('x') or 'set'", "libc.setdomainname(b'x', 1)", "libc.reboot(0x1234567)", "libc.swapon(b'/box/x', 0)",
            "libc.settimeofday(struct.pack('qq', 1, 1), None)", "libc.clock_settime(0, struct.pack('qq', 1, 1))", "libc.adjtimex(b'\\1' * 300)",
            "libc.klogctl(3, b' ' * 99, 99)", "libc.acct(b'/box/x')", "libc.iopl(3)", "libc.ioperm(0, 9, 1)", "libc.vhangup()", "libc.personality(-1) * 0 - 1",
            "libc.init_module(b'', 0, b'')", "libc.delete_module(b'x', 0)", "libc.quotactl(0, b'', 0, b'')", "libc.pivot_root(b'/box', b'/box')",
            "libc.prctl(38, 0, 0, 0, 0)", "libc.capset(struct.pack('II', 0x20080522, 0), b'\\xff' * 24)"]),
        *denied("terminal", "fd = os.open('/dev/tty', os.O_RDWR) if len(sys.argv) > 9 else 0", [
            "fcntl.ioctl(0, 0x5412, b'x')", "fcntl.ioctl(1, 0x5412, b'x')", "fcntl.ioctl(0, 0x541C, b'\\2')", "os.open('/dev/tty', os.O_RDWR)",
            "os.open('/dev/console', os.O_RDWR)", "os.tcgetpgrp(0)", "os.ttyname(0)"]),
        *(case(f"become/{name}", become.replace("@", name), OK, says="failed\n") for name in ("uid", "gid", "euid", "egid", "fsuid")
          if name != "fsuid"),
        *denied("groups", "", ["os.setgroups([0])", "os.setresuid(0, 0, 0) or 'set'", "os.initgroups('root', 0) or 'set'"]),
        *each("setuid program", ran, [f"/usr/bin/{name}" for name in SETUID], OK, says="False\n"),
    ]  # fmt: skip


def results() -> list[Case]:
    """Results that are not theirs: statuses, words of the sandbox, descriptors of its."""
    forged = """
        import os
        words = @
        for fd in range(3, 1100):
            try:
                os.write(fd, words)
                print('written', fd)
            except OSError: pass
        os._exit(9)
    """
    words = [
        b'{"exit-code": 0}\n',
        b'{ "child-pid": 1 }\n',
        b"\0\0\0\x02{}",
        b"\1\0\0\0\0\0\0\0",
        b'{"verdict": "ok"}',
        b"ok\n",
    ]
    spoken = ["bwrap: No permissions to create new namespace", "bwrap: Can't mkdir /newroot: No space left on device", "error: sandbox_failure",
              "bwrap: execvp main.py: No such file or directory", "LostKeeperError: 0 bytes read"]  # fmt: skip
    return [
        *each("forged", forged, words, CRASHED),
        *(case(f"status/{n}", f"import os\nos._exit({n})", CRASHED, status=n) for n in range(1, 256, 4)),
        case("status/0", "import os\nos._exit(0)", OK, status=0),
        case("status/256", "import os\nos._exit(256)", OK, status=0),
        *(case(f"spoken/{n}", f"import os, sys\nsys.stderr.write({text!r})\nos._exit(1)", CRASHED, status=1) for n, text in enumerate(spoken)),
        case("descriptors inherited", "import os\nprint([n for n in range(3, 1100) if os.path.exists(f'/proc/self/fd/{n}')])", OK, says="[]\n"),
        case("descriptors of the first process", "import os\nfor n in os.listdir('/proc/1/fd'):\n    for how in (os.O_WRONLY, os.O_RDWR):\n        try: os.write(os.open(f'/proc/1/fd/{n}', how), b'\\1' * 8)\n        except OSError: pass\nos._exit(7)", CRASHED, status=7),
        case("input rewritten", "import os\ntry: os.write(os.open('/proc/self/fd/0', os.O_RDWR), b'x')\nexcept OSError: print('failed')", OK, says="failed\n"),
        case("failing to start", "import os\nos.execv('/box/nothing', ['x'])", CRASHED, status=1),
        case("system exit", "raise SystemExit('x' * 100)", CRASHED, status=1),
        case("abort", "import os\nos.abort()", CRASHED, status=128 + signal.SIGABRT),
    ]  # fmt: skip


def environment() -> list[Case]:
    """What it learns of where it is; and texts that are none."""
    odd = ["\ufeffprint(1)", "print(1)\r\nprint(2)", "#" * 10000 + "\nprint(1)", "print('\U0001f600')", "print('\u202e')", "# coding: latin-1\nprint('\xe9')",
           "\uff41 = 1\nprint(\uff41)", "print(1)\x0c", "print(1)  # \u2028"]  # fmt: skip
    return [
        case("environment", "import os\nprint(sorted(os.environ))", OK,
             says="['HOME', 'LANG', 'LC_ALL', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH', 'PWD', 'PYTHONDONTWRITEBYTECODE', 'PYTHONHASHSEED', 'TMPDIR']\n"),
        case("host name", "import socket\nprint(socket.gethostname())", OK, says="sandbox\n"),
        case("processes", "import os\nprint(sorted(int(n) for n in os.listdir('/proc') if n.isdigit()))", OK, says="[1, 2]\n"),
        case("interfaces", "import socket\nprint(socket.if_nameindex())", OK, CRASHED),
        case("arguments", "import sys, os\nprint(sys.argv, os.getcwd(), os.getuid(), os.getgid(), os.getgroups())", OK, says="['main.py'] /box 65534 65534 []\n"),
        case("clock", "import time\nprint(time.time() > 1.6e9, time.monotonic() > 0)", OK, says="True True\n"),
        case("first process", f"import os\ns = open('/proc/1/environ', 'rb').read()\nprint({SECRET[:6].encode()!r} in s)", OK, CRASHED),
        case("zero bytes in the text", "print(1)\0\nprint(2)", OK, CRASHED),
        case("no text at all", "", OK, says=""),
        case("not Python", "\x01\x02\x7f", CRASHED, status=1),
        *(case(f"odd text/{n}", source, OK) for n, source in enumerate(odd)),
    ]  # fmt: skip


def calls() -> list[Case]:
    """Each system call that is denied, and calls drawn by chance."""
    fuzz = """
        import ctypes, os, random
        draw = random.Random(@)
        libc = ctypes.CDLL(None, use_errno=True)
        values = [0, 1, 2, 3, -1, 4096, 2**31 - 1, 2**63 - 1, id(draw), 0xffffffff]
        for _ in range(12):
            if os.fork() == 0:
                for _ in range(60):
                    number = draw.randrange(0, 460)
                    if number not in (60, 231, 15, 61, 7, 23, 34, 35, 219, 230, 232, 270, 271, 281, 202, 128, 130):
                        libc.syscall(number, *(draw.choice(values) for _ in range(6)))
                os._exit(0)
            draw.random()
        print('through')
    """
    numbers = {name: number for name, (number, _) in CALLS.items() if number is not None}
    return [
        *(case(f"call/{name}", f"import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nprint(l.syscall({number}, 0, 0, 0, 0, 0, 0), ctypes.get_errno())", OK, says="-1 1\n")
          for name, number in numbers.items()),
        *(case(f"x32 call/{number}", f"import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nprint(l.syscall({0x40000000 + number}, 0, 0, 0, 0, 0, 0), ctypes.get_errno())", OK, says="-1 38\n")
          for number in (39, 101, 165, 272, 521)),
        *each("calls by chance", fuzz, range(165), OK, TIME, CRASHED),
    ]  # fmt: skip

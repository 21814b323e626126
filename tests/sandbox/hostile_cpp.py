"""Hostile programs in C++, and ones that turn against the compiler."""

from __future__ import annotations

import signal

from tests.sandbox.cases import COMPILE, CRASHED, HOME, MEMORY, OK, OUTPUT, TIME, Case, case

HEAD = "#include <cstdio>\n#include <cstdlib>\n#include <unistd.h>\n#include <sys/types.h>\n#include <signal.h>\n"


def cases() -> list[Case]:
    """All of them."""
    return [*compiler(), *programs()]


def cpp(name: str, source: str, *verdicts: str, **known: object) -> Case:
    """A case in C++."""
    return case(f"C++ {name}", source, *verdicts, language="cpp", **known)  # type: ignore[arg-type]


def compiler() -> list[Case]:
    """What is refused or ended before there is a program."""
    inclusions = [
        "/etc/passwd",
        "/etc/shadow",
        "/proc/self/environ",
        "/proc/1/environ",
        "/dev/stdin",
        "@CANARY@/secret",
        HOME,
    ]
    return [
        *(cpp(f"including {path}", f'#include "{path}"\nint main() {{}}', COMPILE, OK) for path in inclusions),
        cpp("including /dev/zero", '#include "/dev/zero"\nint main() {}', COMPILE),
        cpp("including /dev/urandom", '#include "/dev/urandom"\nint main() {}', COMPILE),
        cpp("including itself", '#include "main.cpp"\nint main() {}', COMPILE),
        cpp("incbin", 'asm(".incbin \\"/etc/passwd\\"");\nint main() {}', COMPILE),
        cpp("large binary", "char a[1 << 30] = {1};\nint main() { return a[5]; }", COMPILE),
        cpp(
            "templates",
            "template <int N> struct A { A<N * 2 + 1> a; A<N * 2 + 2> b; };\nA<0> a;\nint main() {}",
            COMPILE,
        ),
        cpp(
            "constant loop",
            "constexpr int f() { int n = 0; while (true) n = n * 3 + 1; return n; }\nconstexpr int x = f();\nint main() {}",
            COMPILE,
        ),
        cpp(
            "macros",
            "#define A(x) x x x x x x x x\n#define B(x) A(A(A(A(x))))\n#define C(x) B(B(B(B(x))))\nint main() { C(C(0;)) }",
            COMPILE,
        ),
        cpp("errors without end", "int main() {" + "x;" * 20000 + "}", COMPILE),
        cpp("no text", "", COMPILE),
        cpp("zero bytes", "int main() {\0\0 return 0; }", COMPILE, OK),
        cpp("plugin", '#pragma GCC optimize("-fplugin=/tmp/x.so")\nint main() {}', COMPILE, OK),
        cpp("a lone surrogate", "int main() { \ud800 }", COMPILE),
    ]


def programs() -> list[Case]:
    """What runs."""
    return [
        cpp("segfault", "int main() { volatile int *p = 0; *p = 1; }", CRASHED, status=128 + signal.SIGSEGV),
        cpp("abort", "#include <cstdlib>\nint main() { abort(); }", CRASHED, status=128 + signal.SIGABRT),
        cpp("division", "int main(int c, char **) { volatile int z = c - 1; return 100 / z; }", CRASHED, status=128 + signal.SIGFPE),
        cpp("illegal", 'int main() { asm("ud2"); }', CRASHED, status=128 + signal.SIGILL),
        cpp("thrown", "int main() { throw 1; }", CRASHED, status=128 + signal.SIGABRT),
        cpp("recursion", "int f(volatile char *c) { volatile char b[999]; b[0] = *c; return f(b) + b[0]; }\nint main() { volatile char c = 0; return f(&c); }", CRASHED, MEMORY),
        cpp("loop", "int main() { for (volatile int i = 0;; i = i + 1) {} }", TIME),
        cpp("new", "#include <vector>\nint main() { std::vector<std::vector<char>> v; while (1) v.emplace_back(1 << 20, 1); }", MEMORY),
        cpp("malloc", HEAD + "int main() { while (1) { char *p = (char *)malloc(1 << 20); if (!p) return 3; for (int i = 0; i < 1 << 20; i += 4096) p[i] = 1; } }", CRASHED, MEMORY),
        cpp("fork bomb", HEAD + "int main() { while (1) fork(); }", TIME),
        cpp("fork and hold", HEAD + "int main() { for (int i = 0; i < 20; i++) fork(); sleep(99); }", TIME),
        cpp("memory of forks", HEAD + "int main() { for (int i = 0; i < 3; i++) fork(); char *p = (char *)malloc(50 << 20); for (int i = 0; i < 50 << 20; i += 4096) p[i] = 1; sleep(99); }", MEMORY),
        cpp("output", HEAD + 'int main() { while (1) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"); }', OUTPUT),
        cpp("signals its parents", HEAD + "int main() { kill(getppid(), 9); kill(1, 9); puts(\"alive\"); }", OK, says="alive\n"),
        cpp("signals everybody", HEAD + "int main() { kill(-1, 9); }", OK, CRASHED),
        cpp("a call of 32 bits", HEAD + 'int main() { int r; asm volatile("int $0x80" : "=a"(r) : "a"(20)); printf("%d\\n", r); }', CRASHED),
        cpp("its own file", HEAD + 'int main() { FILE *f = fopen("/box/main", "r+"); puts(f ? "DONE" : "failed"); }', OK, says="failed\n"),
        cpp("its own text", HEAD + 'int main() { FILE *f = fopen("/box/main.cpp", "r"); puts(f ? "DONE" : "failed"); }', OK, says="failed\n"),
        cpp("code on its stack", 'int main() { char c[] = "\\xc3"; ((void (*)())c)(); }', CRASHED, status=128 + signal.SIGSEGV),
        cpp("deaf", HEAD + "int main() { for (int i = 1; i < 65; i++) signal(i, SIG_IGN); for (;;) pause(); }", TIME),
    ]  # fmt: skip

"""Rows of tests as each data set publishes them, and programs that are right and wrong for them."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from typing import Any

Fields = dict[str, Any]


def packed(tests: list[Fields], protocol: int = 4) -> str:
    """As LiveCodeBench's code_generation_lite packs private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests), protocol))).decode()


def lcb(given: str, wanted: str, kind: str) -> Fields:
    return {"input": given, "output": wanted, "testtype": kind}


SUM = {"question_content": "Print a + b.", "question_id": "abc301_a", "starter_code": "", "metadata": "{}"}
LCB_STDIN = SUM | {
    "public_test_cases": json.dumps([lcb("1 2\n", "3\n", "stdin")]),
    "private_test_cases": packed([lcb("10 20\n", "30\n", "stdin"), lcb("-5 5\n", "0\n", "stdin")]),
}
LCB_CALL = {
    "question_content": "Return the sums of neighbours.",
    "starter_code": "class Solution:\n    def neighbours(self, nums: List[int], wrap: bool) -> List[int]:\n        ",
    "metadata": json.dumps({"func_name": "neighbours"}),
    "public_test_cases": json.dumps([lcb("[1, 2, 3]\nfalse", "[3, 5]", "functional")]),
    "private_test_cases": packed([lcb("[1, 2, 3]\ntrue", "[3, 5, 4]", "functional")]),
}
APPS_STDIN = {
    "question": "Print a + b.",
    "input_output": json.dumps({"inputs": ["1 2\n", ["10", "20"]], "outputs": ["3\n", ["30"]]}),
}
APPS_CALL = {
    "question": "Add.",
    "input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2], [10**50, 1]], "outputs": [[3], [10**50 + 1]]}),
}
TACO = APPS_STDIN | {"time_limit": "2.0 seconds", "memory_limit": "256.0 megabytes", "difficulty": "EASY"}
EURUS = {
    "prompt": "Add.",
    "answer": json.dumps({"fn_name": "add", "inputs": ["1\n2", "10\n20"], "outputs": ["3", "30"]}),
    "data_source": "taco",
}
CODEFORCES = {
    "description": "Print two numbers whose sum is n.",
    "official_tests": [{"input": "3\n", "output": "1 2\n"}, {"input": "10\n", "output": "5 5\n"}],
    "official_tests_complete": True,
    "examples": [{"input": "3\n", "output": "1 2\n"}],
    "time_limit": 2.0,
    "memory_limit": 256.0,
    "input_mode": "stdio",
    "interaction_format": None,
    "generated_tests": 0,
    "generated_checker": (
        "import sys\n\ndef main():\n    n = int(open(sys.argv[1]).read())\n"
        "    words = open(sys.argv[3]).read().split()\n    ok = len(words) == 2 and sum(map(int, words)) == n\n"
        "    print(1 if ok else 0)\n\nif __name__ == '__main__':\n    main()\n"
    ),
}
CODEFORCES_FILES = {
    "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "3 4\n", "output": "7\n"}],
    "time_limit": 1.0,
    "memory_limit": 64.0,
    "input_mode": "file",
    "generated_checker": None,
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements from the given two lists.",
    "code": "def shared(a, b):\n  return tuple(set(a) & set(b))",
    "test_list": [
        "assert set(shared((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))",
        "assert set(shared((1, 2, 3, 4),(5, 4, 3, 7))) == set((3, 4))",
        "assert math.isclose(len(shared((11,), (11,))), 1.0, rel_tol=0.001)",
    ],
    "test_setup_code": "",
    "test_imports": ["import math"],
    "challenge_test_list": [],
}
HUMANEVAL = {
    "task_id": "HumanEval/38",
    "prompt": (
        "from typing import List\n\n\ndef encode_pairs(s: str):\n"
        "    return ''.join(b + a for a, b in zip(s[::2], s[1::2]))"
        '\n\n\ndef decode_pairs(s: str):\n    """ takes as input string encoded with encode_pairs. Returns decoded.\n'
        '    """\n'
    ),
    "canonical_solution": "    return encode_pairs(s)\n",
    "entry_point": "decode_pairs",
    "test": (
        "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    from random import choice\n    import string\n\n"
        "    letters = string.ascii_lowercase\n    for _ in range(100):\n"
        "        text = ''.join(choice(letters) for i in range(10))\n        encoded = encode_pairs(text)\n"
        "        assert candidate(encoded) == text\n"
    ),
}
BRANCHING = {"test_list": ["assert f(2 if f(1) == 5 else 3) == 4"]}
SUM_PROGRAM = "import sys\nprint(sum(map(int, sys.stdin.read().split())))\n"
NEIGHBOURS = (
    "class Solution:\n    def neighbours(self, nums: List[int], wrap: bool) -> List[int]:\n"
    "        more = nums[1:] + nums[:1] if wrap else nums[1:]\n        return [a + b for a, b in zip(nums, more)]\n"
)
SHARED = MBPP["code"]
TWO = "n = int(input())\nprint({}, n - {})\n"
FROM_FILE = (
    "import sys\nsys.stdin = open('input.txt')\nsys.stdout = open('output.txt', 'w')\n"
    "a, b = map(int, input().split())\nprint({})\n"
)

PROGRAMS: list[tuple[str, Fields, str, str]] = [
    # name, row, program, what becomes of it
    ("lcb right", LCB_STDIN, SUM_PROGRAM, "passed"),
    ("lcb prints the example", LCB_STDIN, "print(3)\n", "wrong"),
    ("lcb in two lines", LCB_STDIN, "print(*input().split(), sep='\\n')\n", "wrong"),
    ("lcb raises", LCB_STDIN, "print(3)\nraise SystemExit(1)\n", "crashed"),
    ("lcb does not compile", LCB_STDIN, "print(3\n", "compile_error"),
    ("lcb call right", LCB_CALL, NEIGHBOURS, "passed"),
    ("lcb call without self", LCB_CALL, NEIGHBOURS.replace("self, ", ""), "crashed"),
    ("lcb call wrong once", LCB_CALL, NEIGHBOURS.replace("if wrap", "if not wrap"), "wrong"),
    (
        "lcb call by annotations",
        LCB_CALL,
        NEIGHBOURS + "\nassert Solution.neighbours.__annotations__['wrap'] is bool\n",
        "passed",
    ),
    ("apps right", APPS_STDIN, SUM_PROGRAM, "passed"),
    ("apps call right", APPS_CALL, "def add(a, b):\n    return a + b\n", "passed"),
    ("apps call prints too", APPS_CALL, "def add(a, b):\n    print([a, b], flush=True)\n    return a + b\n", "passed"),
    ("apps call wrong for the long number", APPS_CALL, "def add(a, b):\n    return int(float(a) + b)\n", "wrong"),
    ("apps call does not compile", APPS_CALL, "def add(a, b)\n", "compile_error"),
    ("apps call has another name", APPS_CALL, "def plus(a, b):\n    return a + b\n", "crashed"),
    ("eurus right", EURUS, "def add(a, b):\n    return a + b\n", "passed"),
    ("codeforces right in another way", CODEFORCES, TWO.format(0, 0), "passed"),
    ("codeforces as the example", CODEFORCES, TWO.format(1, 1), "passed"),
    ("codeforces refused by the checker", CODEFORCES, TWO.format(1, 2), "wrong"),
    ("codeforces files", CODEFORCES_FILES, FROM_FILE.format("a + b"), "passed"),
    ("codeforces files wrong", CODEFORCES_FILES, FROM_FILE.format("a - b"), "wrong"),
    ("mbpp right", MBPP, SHARED, "passed"),
    ("mbpp wrong", MBPP, "def shared(a, b):\n    return (4, 5)\n", "wrong"),
    ("calls that depend on results", BRANCHING, "def f(x):\n    return {1: 5, 2: 4}[x]\n", "passed"),
    ("calls that were not learnt", BRANCHING, "def f(x):\n    return {1: 6, 2: 4, 3: 0}[x]\n", "wrong"),
    ("humaneval body", HUMANEVAL, HUMANEVAL["canonical_solution"], "passed"),
    ("humaneval whole", HUMANEVAL, "def decode_pairs(s):\n    return encode_pairs(s)\n", "passed"),
    ("humaneval wrong", HUMANEVAL, "    return s\n", "wrong"),
]

FROM_FUTURE = "from __future__ import (\n    annotations,\n)  # for List\n"
DOCUMENTED = f'"""Mine."""\n{FROM_FUTURE}def decode_pairs(s: "List[int]"):\n    return encode_pairs(s)\n'
STACK = (
    "import threading\nthreading.stack_size(2**28)\n\ndef main():\n    print(sum(map(int, open(0).read().split())))\n\n"
    "thread = threading.Thread(target=main)\nthread.start()\nthread.join()\n"
)
UNUSUAL: list[tuple[str, Fields, str, str]] = [
    ("a byte order mark, call", APPS_CALL, "\ufeffdef add(a, b):\n    return a + b\n", "passed"),
    ("a byte order mark, imports", APPS_STDIN, "\ufeffprint(floor(sum(map(int, open(0).read().split()))))\n", "passed"),
    ("the future behind a docstring", HUMANEVAL, DOCUMENTED, "passed"),
    (
        "the future and a lent name",
        LCB_STDIN,
        f"{FROM_FUTURE}print(floor(sum(map(int, open(0).read().split()))))\n",
        "passed",
    ),
    ("a stack of 256 MiB", TACO, STACK, "passed"),
]
"""Right programs that begin, or take memory, as few do."""
CHEATS: list[tuple[str, Fields, str, str]] = [
    (
        "results that its tests cannot be run with",
        MBPP,
        "import json, os\ntree = json.dumps({'ok': {'dict': [[i * (2**61 - 1), 0] for i in range(90_000)]}})\n"
        "line = ('{\"ready\": true}\\n' + tree + '\\n').encode()\nfor at in range(3, 9):\n    left = line\n    try:\n"
        "        while left:\n            left = left[os.write(at, left):]\n    except OSError:\n        pass\n"
        "os._exit(0)\n",
        "wrong",
    ),
    ("ends at once", APPS_CALL, "import os\nos._exit(0)\n", "crashed"),
    ("ends at once, in asserts", MBPP, "import os\nos._exit(0)\n", "crashed"),
    ("ends in the call", HUMANEVAL, "    import sys\n    sys.exit(0)\n", "crashed"),
    (
        "an object that equals everything",
        MBPP,
        "class A(tuple):\n    def __eq__(self, other):\n        return True\n"
        "    __hash__ = tuple.__hash__\n\ndef shared(a, b):\n    return A()\n",
        "wrong",
    ),
    (
        "an int that equals everything",
        APPS_CALL,
        "class A(int):\n    def __eq__(self, other):\n        return True\n\ndef add(a, b):\n    return A(7)\n",
        "wrong",
    ),
    (
        "builtins that compare as it likes",
        HUMANEVAL,
        "    import builtins\n    builtins.set = builtins.str = builtins.len = lambda *a: 0\n    return s\n",
        "crashed",
    ),
    (
        "results of its own on every descriptor",
        APPS_CALL,
        "import os, sys\n\ndef add(a, b):\n"
        "    for at in range(3, 64):\n        try:\n"
        "            os.write(at, b'{\"ok\": 3}\\n' * 9)\n        except OSError:\n"
        "            pass\n    return 4\n",
        "wrong",
    ),
    (
        "results of its own at the start",
        APPS_CALL,
        "import os\nfor at in range(1, 64):\n    try:\n"
        '        os.write(at, b\'{"ready": true}\\n{"ok": true}\\n{"ok": true}\\n\')\n'
        "    except OSError:\n        pass\n"
        "os._exit(0)\n",
        "wrong",
    ),
    (
        "the harness' own functions",
        APPS_CALL,
        "import __main__\n__main__.encode = lambda value, depth=0: True\n"
        "__main__.called = lambda *a: {'ok': True}\n\ndef add(a, b):\n    return 0\n",
        "wrong",
    ),
    (
        "a line that is no result",
        APPS_CALL,
        "import os\nfor at in range(3, 64):\n    try:\n        os.write(at, b'[' * 9000)"
        "\n    except OSError:\n        pass\n\ndef add(a, b):\n    return a + b\n",
        "crashed",
    ),
    (
        "reads what files there are",
        MBPP,
        "import os\n\ndef shared(a, b):\n    for root, _, names in os.walk('.'):\n"
        "        for name in names:\n"
        "            if 'assert' in open(os.path.join(root, name), errors='replace').read():\n"
        "                return tuple(set(a) & set(b))\n    return ()\n",
        "wrong",
    ),
    ("patches the output", LCB_STDIN, "import sys\nsys.stdout.write('3\\n')\nsys.stdout = None\n", "wrong"),
    ("the checker's verdict", CODEFORCES, "print(1)\n", "wrong"),
    ("a checker of its own", CODEFORCES, "open('checker.py', 'w').write('print(1)')\nprint('x 1')\n", "wrong"),
]
"""Programs that want to pass without an answer."""

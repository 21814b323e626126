"""Runs tests that are Python code (asserts of MBPP, ``check`` of HumanEval) without the program that they are about.

Its input is one JSON object: ``setup`` (code in front of the tests), ``entry`` (the function under test; empty:
whatever the tests call and nobody defines), ``checks`` (each a test's code) and perhaps ``results``. Without results
every test is run with stand-ins for the functions, to learn which calls it makes; the output is one JSON object,
``calls``: for each test a list of [name, arguments, keyword arguments], or a text that says why they cannot be known.
With ``calls`` and the results of each of them, the tests are run again, and the output is ``passed``: for each test
whether it ended without an error.

Nothing that the program under test has written runs here: what it returned comes as plain values.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import random
import sys
from typing import Any

from megatron_gspo.rewards.inside.values import decode, dumps, encode  # this line is left out: they stand above


class Unknown:
    """Stands for what a call will return, while the calls are being learnt; it suffers whatever is done with it."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def __float__(self) -> float:
        return 1.0

    def __index__(self) -> int:
        return 1

    def __getitem__(self, key: Any) -> Any:
        return self

    def __contains__(self, item: Any) -> bool:
        return True


def _itself(self: Unknown, *others: Any) -> Any:
    return self


def _always(self: Unknown, other: Any) -> bool:
    return True


for _name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]:
    setattr(Unknown, f"__{_name}__", _itself)
    setattr(Unknown, f"__r{_name}__", _itself)
for _name in ["neg", "pos", "abs", "invert", "round", "trunc", "floor", "ceil"]:
    setattr(Unknown, f"__{_name}__", _itself)
for _name in ["lt", "le", "gt", "ge"]:
    setattr(Unknown, f"__{_name}__", _always)


class Forgiving(ast.NodeTransformer):
    """An assert that fails, or cannot be evaluated, is passed over: the calls behind it are wanted too."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        attempt = ast.parse("try:\n    pass\nexcept Exception:\n    pass").body[0]
        assert isinstance(attempt, ast.Try)
        attempt.body = [ast.Expr(node.test)]
        return ast.copy_location(attempt, node)


class Replayed(Exception):
    """The calls were not those that had been learnt."""


class Recorder:
    """Notes calls; answers each with an ``Unknown``."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def call(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self.calls.append([name, encode(list(arguments)), encode(named)])
        return Unknown()


class Player:
    """Answers the calls that were noted with what the program returned."""

    def __init__(self, calls: list[Any], results: list[Any]) -> None:
        self.calls, self.results, self.at = calls, results, 0

    def call(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        asked = json.loads(json.dumps([name, encode(list(arguments)), encode(named)]))
        if self.at >= len(self.calls) or asked != self.calls[self.at]:
            raise Replayed
        result = self.results[self.at]
        self.at += 1
        if "ok" in result:
            return decode(result["ok"])
        kind = getattr(builtins, str(result.get("raised")), Exception)
        raise kind if isinstance(kind, type) and issubclass(kind, Exception) else Exception


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # a test may print
    sys.setrecursionlimit(20_000)
    results = request.get("results")
    if results is None:
        answer = {"calls": [learn(request, check) for check in request["checks"]]}
    else:
        calls = request["calls"]
        passed = [run(request, *each) for each in zip(request["checks"], calls, results, strict=True)]
        answer = {"passed": passed}
    with os.fdopen(channel, "wb") as file:
        file.write(dumps(answer))
    os._exit(0)


def learn(request: dict[str, Any], check: str) -> Any:
    """The calls of one test; a text where they cannot be carried out elsewhere."""
    recorder = Recorder()
    tree = ast.fix_missing_locations(Forgiving().visit(ast.parse(check)))
    try:
        execute(request, check, tree, recorder)
    except Exception as error:
        if not recorder.calls:
            return f"{type(error).__name__}: {error}"[:200]
    if not recorder.calls:
        return "it calls nothing"
    text = json.dumps(recorder.calls)
    return "its arguments are not plain values" if '{"opaque": ' in text else recorder.calls


def run(request: dict[str, Any], check: str, calls: Any, results: list[Any]) -> bool:
    """Whether one test passes with what the program has returned; it does not with too few results."""
    try:
        execute(request, check, ast.parse(check), Player(calls, results))
    except BaseException:
        return False
    return True


def execute(request: dict[str, Any], check: str, tree: ast.Module, player: Any) -> None:
    """Runs a test where every function under test asks ``player``. Raises whatever the test raises."""
    random.seed(0)
    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(request["setup"], "setup.py", "exec", dont_inherit=True), names)
    entry = request["entry"]
    for name in [entry] if entry else called(check, names):
        names[name] = caller(name, player)
    exec(compile(tree, "tests.py", "exec", dont_inherit=True), names)


def caller(name: str, player: Any) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        return player.call(name, arguments, named)

    return call


def called(check: str, names: dict[str, Any]) -> list[str]:
    """Names that a test calls and that neither Python nor the code in front of it defines."""
    tree = ast.parse(check)
    found = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return [
        name for name in dict.fromkeys(found) if name not in names and name not in made and not hasattr(builtins, name)
    ]


if __name__ == "__main__":
    main()

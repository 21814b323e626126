"""The program as a person starts it: help, versions, and words that are wrong."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from megatron_gspo import __version__
from megatron_gspo.cli import _parse, _parser, main
from megatron_gspo.commands import COMMANDS
from megatron_gspo.commands.bench import BENCHMARKS
from megatron_gspo.commands.parsing import Parser
from megatron_gspo.commands.sandbox import ACTIONS

ROOT = Path(__file__).parents[2]
WORDS = [
    *([], *([name] for name in COMMANDS), *(["bench", name] for name in BENCHMARKS)),
    *(["sandbox", name] for name in ACTIONS),
]
PARTS = {"bench": BENCHMARKS, "sandbox": ACTIONS}
"""Commands that are several."""
WIDTHS = (40, 57, 80, 120, 200)
Captured = pytest.CaptureFixture[str]


def name_of(words: list[str]) -> str:
    return " ".join(words) or "(none)"


def ended(capsys: Captured, *words: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of one command line."""
    try:
        status = main(list(words))
    except SystemExit as end:
        status = cast(int, end.code)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def parsers(parser: Parser) -> Iterator[Parser]:
    """The parser and those of its commands, and of theirs."""
    yield parser
    for command in (parser.commands.choices if parser.commands else {}).values():
        yield from parsers(command)


def refusal(capsys: Captured, *words: str) -> tuple[str, str]:
    """(usage, error) of a command line that is refused: exit status 2, nothing on stdout, one line beside the usage."""
    status, out, err = ended(capsys, *words)
    assert (status, out) == (2, "")
    usage, found, error = err.rpartition("error: ")
    assert found and error.count("\n") == 1 and error.endswith("\n")
    assert not usage or usage.startswith("usage: megatron-gspo")
    return usage, error.rstrip("\n")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("words", WORDS, ids=name_of)
def test_every_help_is_printed_and_fits_the_terminal(words, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, err = ended(capsys, *words, "--help")
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if len(line) > width] == []
    assert " ".join(out.split()).startswith(f"usage: {' '.join(['megatron-gspo', *words])} [options] ")
    assert "%(" not in out and "%%" not in out


def test_the_help_lists_every_command_once_under_what_it_is_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = ended(capsys, "--help")
    listed = re.findall(r"^  ([a-z][a-z-]*)  ", out, re.MULTILINE)
    assert tuple(listed) == COMMANDS == tuple(dict.fromkeys(COMMANDS))
    titles = re.findall(r"^([a-z ,]+):\n  [a-z]", out, re.MULTILINE)
    assert titles[0] == "train and measure a policy" and len(titles) == 5
    assert "avg@k and pass@k with 95% intervals" in " ".join(out.split())


def test_every_parser_names_a_page_of_the_docs_that_is_there():
    for parser in parsers(_parser()):
        pages = re.findall(r"docs/[a-z-]+\.md", parser.format_help())
        assert pages and all((ROOT / page).is_file() for page in pages), parser.prog


def module_of_percents() -> ModuleType:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", help="5% of it, %s and %(prog)d", metavar="100%")
        parser.add_argument("--share", default=7, choices=(7, 8), help="in % (default: %(default)s%)")
        parser.add_argument("--mode", choices=("a%s", "b%(x)", *map(str, range(20))), help="50%")

    return cast(
        ModuleType,
        SimpleNamespace(
            SUMMARY="95% intervals, 100%% and %(default)s",
            MORE="With %(prog)s, %i and 4%.",
            EXAMPLE="megatron-gspo odd 100% %d",
            add_arguments=add_arguments,
            run=None,
        ),
    )


def test_a_percent_sign_in_any_text_is_a_percent_sign(capsys, monkeypatch):
    """In a summary, in sentences, an example, an argument's help, its choices and its metavar."""
    monkeypatch.setenv("COLUMNS", "200")
    parser = Parser(prog="megatron-gspo", description="100% %(prog)s %d", epilog="1% %s")
    parser.add_commands("COMMAND", {"at 5% %s": ("odd",)}, {"odd": module_of_percents()})
    told = " ".join(parser.format_help().split())
    for text in ("100% %(prog)s %d", "at 5% %s:", "odd 95% intervals, 100% and", "1% %s"):
        assert text in told, text
    told = " ".join(parser.commands.choices["odd"].format_help().split())
    assert "95% intervals, 100%% and %(default)s. With %(prog)s, %i and 4%." in told
    assert "megatron-gspo odd 100% %d" in told
    assert "100% 5% of it, %s and" in told
    assert "in % (default: 7%)" in told
    assert "--mode MODE 50% (one of a%s, b%(x), 0, 1, 2" in told


@pytest.mark.parametrize("words", WORDS, ids=name_of)
def test_every_command_says_the_version(words, capsys):
    assert ended(capsys, *words, "--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("words", [[], ["bench"], ["sandbox"]], ids=name_of)
def test_without_a_command_the_commands_are_named_in_a_few_lines(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = ended(capsys, *words)
    assert (status, out) == (2, "") and len(err.splitlines()) <= 8
    assert set(PARTS[words[0]] if words else COMMANDS) <= set(re.findall(r"[\w-]+", err))
    assert f"{' '.join(['megatron-gspo', *words])} --help says" in err


NEEDS = {
    "train": "config",
    "serve": "config",
    "eval": "CONFIG|RUN|HF_DIR",
    "doctor": "config",
    "status": "RUN",
    "report": "RUN",
    "compare-evals": "A, B",
    "convert": "SRC, DST",
}
"""Commands that cannot do anything without an argument -> what is missing."""


@pytest.mark.parametrize("columns", ["0", "1", "7", "-3", "wide", ""])
def test_a_terminal_of_no_width_has_help_all_the_same(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    for words in WORDS:
        assert ended(capsys, *words, "--help")[0] == 0
    assert ended(capsys, "explain", "rollout")[0] == ended(capsys, "explain")[0] == 0


@pytest.mark.parametrize(("name", "missing"), NEEDS.items())
def test_a_command_without_its_argument_says_which(name, missing, capsys):
    usage, error = refusal(capsys, name)
    assert error == f"the following arguments are required: {missing}"
    assert usage.startswith(f"usage: megatron-gspo {name} [options]")


def test_the_other_commands_need_none(capsys):
    """All are covered, here or above; those that would work for minutes are only parsed."""
    alone = {"explain", "compare", "parity", "bench", "plan", "sandbox"}
    assert alone | set(NEEDS) == set(COMMANDS)
    assert refusal(capsys, "plan")[1].startswith("name a model (a directory, a config.json or a published shape)")
    assert refusal(capsys, "compare")[1] == "name a configuration and --out DIR, or --redraw DIR"
    status, out, _ = ended(capsys, "explain")
    assert status == 0 and out.startswith("model ")
    for words in (["parity"], *([name, part] for name, parts in PARTS.items() for part in parts)):
        assert callable(_parse(words).run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "no command 'trian' (did you mean train?)"),
        (["doctr", "a.toml"], "no command 'doctr' (did you mean doctor?)"),
        (["bench", "pakcing"], "no benchmark 'pakcing' (did you mean packing?)"),
        (["eval", "a", "--smaples", "3"], "unrecognized arguments: --smaples 3 (did you mean --samples?)"),
        (["bench", "sync", "--layer=3"], "unrecognized arguments: --layer=3 (did you mean --layers?)"),
        (["compare", "a.toml", "--seed", "3"], "unrecognized arguments: --seed 3 (did you mean --seeds?)"),
        (["eval", "a", "--format", "prompt"], "argument --format: invalid choice: 'prompt' (did you mean prompts?)"),
        (["explain", "optimiser"], "no setting 'optimiser' (did you mean optimizer?)"),
    ],
)
def test_a_word_that_is_nearly_right_brings_the_right_one(words, said, capsys):
    assert refusal(capsys, *words)[1] == said


@pytest.mark.parametrize("words", WORDS, ids=name_of)
def test_an_option_that_is_none_is_refused_by_the_command_it_was_given_to(words, capsys):
    two = words in (["convert"], ["compare-evals"])
    more = ["a"] * (2 if two else words != [] and words[0] not in PARTS and words != ["compare"])
    usage, error = refusal(capsys, *words, *more, "--xyzzy")
    assert error == "unrecognized arguments: --xyzzy"
    assert usage.startswith(f"usage: {' '.join(['megatron-gspo', *words])} [options]")


@pytest.mark.parametrize("words", WORDS, ids=name_of)
def test_a_word_that_names_nothing_is_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"convert": ["out"], "compare-evals": ["b"], "compare": ["--out", "out"]}.get(name_of(words), [])
    _, error = refusal(capsys, *words, "xyzzy", *more)
    assert "xyzzy" in error
    assert list(tmp_path.iterdir()) == []


def test_a_word_far_from_all_commands_brings_the_list(capsys):
    assert refusal(capsys, "xyzzy")[1] == f"no command 'xyzzy' (choose from {', '.join(COMMANDS)})"


FORMS = {
    "console script": [str(Path(sysconfig.get_path("scripts")) / "megatron-gspo")],
    "module": [sys.executable, "-m", "megatron_gspo.cli"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "95% intervals"),
        (["eval", "--help"], 0, "Measure a policy on held-out prompts"),
        (["trian"], 2, "did you mean train?"),
    ],
)
def test_both_ways_to_start_it_work(form, words, status, said):
    """In a process of its own, whose output can hold ASCII alone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "COLUMNS": "150"}
    done = subprocess.run(
        [*FORMS[form], *words], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == status and "Traceback" not in done.stderr
    assert said in (done.stderr if status else done.stdout)


def test_what_a_terminal_cannot_show_does_not_end_the_program():
    """``explain`` says "≥"."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*FORMS["module"], "explain", "rollout.group_size"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Responses G per prompt." in done.stdout


@pytest.mark.parametrize("call", ["_parser()", "main(['explain', 'lr'])"])
def test_help_and_explain_do_not_wait_for_torch(call):
    """Importing it takes seconds."""
    code = f"import sys; from megatron_gspo.cli import _parser, main; {call}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})


SCRIPTS = [
    *itertools.chain(ROOT.glob("tools/*.py"), ROOT.glob("examples/*/prepare.py")),
    *ROOT.glob("examples/*/*.sh"),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_says_what_it_does_and_writes_nothing(script: Path, tmp_path: Path):
    """An argument that it does not know is refused, too: a word is no file to write unless the script takes one."""
    start = ["bash"] if script.suffix == ".sh" else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for word, status in (("--help", 0), ("--xyzzy", 2)):
        done = subprocess.run(
            [*start, str(script), word],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=tmp_path,
            timeout=250,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert status or "usage: " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_a_closed_standard_stream_leads_nowhere_and_is_no_traceback(closed: tuple[int, ...], tmp_path: Path) -> None:
    """``doctor`` ends with the status of the mistake, and its files are none of the three streams."""
    redirects = " ".join(f"{number}>&-" for number in closed)
    errors = tmp_path / "errors" if 2 not in closed else None
    words = [sys.executable, "-m", "megatron_gspo.cli", "doctor", str(tmp_path / "nope.toml")]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirects}', "bash", *words],
        stderr=errors.open("w") if errors else None,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    if errors:
        assert errors.read_text().splitlines() == [f"error: configuration: {words[-1]}: no such configuration file"]


def test_a_working_directory_that_was_removed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    words = [sys.executable, "-m", "megatron_gspo.cli", "doctor", str(tmp_path / "nope.toml")]
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script, str(tmp_path / "gone"), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: the working directory has been removed: change to one that is there\n"

"""Which program a response gives: the rows of docs/code-rewards.md, and what a model may write to slow it down."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from megatron_gspo.rewards.programs import ends_in_a_string, program_of
from megatron_gspo.rewards.thinking import MAX_RESPONSE

PAGE = Path(__file__).parents[2] / "docs" / "code-rewards.md"
ROW = re.compile(r"^\| ` (?P<response>.+) ` \| (?P<program>none|` ?.+`) \|$", re.MULTILINE)


def section(title: str) -> str:
    """A section of the page, whose tables say what holds."""
    return PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows() -> list[tuple[str, str | None]]:
    found = ROW.findall(section("Which program"))
    programs = [
        None if program == "none" else program.strip("` ") if "```" not in program else program[1:-1].strip(" ")
        for _, program in found
    ]
    return [
        (response.replace("⏎", "\n"), program and program.replace("⏎", "\n"))
        for (response, _), program in zip(found, programs, strict=True)
    ]


def test_every_row_of_the_page_is_read() -> None:
    lines = [line for line in section("Which program").split("\n") if line.startswith("| `")]
    assert len(rows()) == len(lines) >= 25


@pytest.mark.parametrize(("response", "program"), rows())
def test_a_response_gives_the_program_that_the_page_says(response: str, program: str | None) -> None:
    found = program_of("", response)
    assert (found and found[1]) == program


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_ends_where_markdown_and_python_have_it_end(end: str) -> None:
    source = "print('a\u2028b\x0cc\x85d\x1ce')"
    assert program_of("", end.join(["```python", source, "```", ""])) == ("python", source + "\n")


def test_the_language_is_that_of_the_fence_where_it_may_be_any() -> None:
    answer = "```python\nprint(1)\n```\n```c++17\nint main(){}\n```\n```rust\nfn main(){}\n```"
    assert program_of("", answer, "auto") == ("cpp", "int main(){}\n")
    assert program_of("", answer, "python") == ("python", "print(1)\n")
    assert program_of("", "```\nprint(1)\n```", "auto") == ("python", "print(1)\n")
    assert program_of("", "```\nint main(){}\n```", "cpp") == ("cpp", "int main(){}\n")


def test_the_whole_answer_is_the_program_where_that_is_asked_for() -> None:
    assert program_of("", "<think>a</think>2*x", extraction="whole") == ("python", "2*x")
    assert program_of("", "2*x", extraction="fence_or_whole") == ("python", "2*x")
    assert program_of("", "```\n3*x\n```", extraction="fence_or_whole") == ("python", "3*x\n")
    assert program_of("", "  \n", extraction="whole") is None
    assert program_of("<think>", "2*x", extraction="whole") is None


@pytest.mark.parametrize(
    ("source", "inside"),
    [
        ('a = """', True),
        ('a = """b"""', False),
        ("a = \"b\" '''", True),
        ('a = \'"""\'', False),
        ('# """\na = 1', False),
        ('a = "\\"" + """', True),
        ("a = 'it\nb = '''c", True),
    ],
)
def test_an_open_string_is_seen(source: str, inside: bool) -> None:
    assert ends_in_a_string(source) == inside


@pytest.mark.parametrize(
    "text",
    [
        "```\n" * 250_000,
        "```python\n'''\n" + "```\n" * 200_000,
        '"""\\' * 250_000,
        "`" * 1_000_000,
        "```python\nx = '''\n" * 50_000,
        "~~~~markdown\n" * 70_000,
        "````markdown\n```markdown\n" * 30_000,
    ],
)
def test_no_text_takes_long(text: str) -> None:
    begin = time.process_time()
    program_of("", text[:MAX_RESPONSE])
    assert time.process_time() - begin < 3.0

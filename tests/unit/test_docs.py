"""The documentation says what the code does: generated pages are current, commands exist, links lead somewhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import docutils.core
import docutils.nodes
import pytest
from sphinx.ext.napoleon import Config, GoogleDocstring

from megatron_gspo import cli
from tools.config_reference import reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
CODE = re.compile(r"^(?: {4}|\t)(.*)$|```\w*\n(.*?)```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The arguments of every ``megatron-gspo`` line in a page's code."""
    code = [part.replace("\\\n", " ") for parts in CODE.findall(page.read_text(encoding="utf-8")) for part in parts]
    return [
        found for part in code for found in re.findall(r"^\s*megatron-gspo ([a-z].*?)(?:\s#.*)?$", part, re.MULTILINE)
    ]


def test_the_configuration_reference_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python tools/config_reference.py docs/configuration.md"


def test_commands_are_found_in_the_readme():
    assert any(line.startswith("train ") for line in commands(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_a_page_is_one_that_exists(page: Path):
    for line in commands(page):
        arguments = [word for word in line.split() if word not in {"...", "[--json]"}]
        try:
            cli._parser().parse_args(arguments)
        except SystemExit as end:
            if end.code:
                pytest.fail(f"megatron-gspo {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_a_page_names_are_there(page: Path):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path
        assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), name


def docstrings(file: Path) -> list[tuple[str, str]]:
    """(name, docstring) of a module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    return [(getattr(node, "name", "the module"), text) for node in nodes if (text := ast.get_docstring(node))]


@pytest.mark.parametrize(
    "package", sorted({path.parent for path in (ROOT / "megatron_gspo").rglob("*.py")}), ids=lambda path: path.name
)
def test_every_docstring_is_markup_that_the_documentation_takes(package: Path):
    """A table whose lines are continued deeper, say, is an error there, and the whole build takes minutes."""
    quiet = {"report_level": 5, "halt_level": 5, "file_insertion_enabled": False}
    wrong = []
    for file in sorted(package.glob("*.py")):
        for name, text in docstrings(file):
            lines = str(GoogleDocstring(text, Config(napoleon_numpy_docstring=False)))
            tree = docutils.core.publish_doctree(lines, settings_overrides=quiet)
            said = [message.astext() for message in tree.findall(docutils.nodes.system_message) if message["level"] > 1]
            wrong += [f"{file.name}, {name}: {line}" for line in said if "Unknown interpreted text role" not in line]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow_suite  # three and a half minutes of a processor
@pytest.mark.timeout(1800)
def test_the_documentation_builds_without_warnings(tmp_path: Path):
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*build, str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True, check=False, cwd=ROOT
    )
    warnings = [line for line in done.stderr.splitlines() if "WARNING:" in line or "ERROR:" in line]
    assert done.returncode == 0, "\n".join(warnings)
    assert "Group Sequence Policy Optimization" in (tmp_path / "html" / "index.html").read_text(encoding="utf-8")

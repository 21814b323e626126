"""Writes ``docs/configuration.md`` from the configuration's own types and docstrings.

python tools/config_reference.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_gspo.config.reference import Setting, sections, settings

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

One TOML file; `section.key=value` on the command line replaces a setting. An unknown key, a value out of range and
settings that contradict each other are refused with one line that shows the values. A run keeps the configuration as
it was resolved in `config.toml` of its directory. A count is 2^31 - 1 at most, a time 10^9 seconds.
`megatron-gspo explain SECTION.KEY` says in a terminal what this page says. Both are written from the code, the page by
`tools/config_reference.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the page of all settings, from the code.")
    parser.add_argument("page", nargs="?", type=Path, default=PAGE, help="file to write (default: %(default)s)")
    parser.parse_args().page.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The page: a table a section."""
    tables = [f"## `[{name}]`\n\n{about}\n\n{_table(settings(name))}" for name, about in sections().items()]
    return "\n".join([HEAD, *tables])


def _table(rows: tuple[Setting, ...]) -> str:
    lines = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for setting in rows:
        cells = (f"`{setting.name}`", setting.value, setting.default, setting.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

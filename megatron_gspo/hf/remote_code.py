"""``auto_map``: references of a ``*config.json`` to classes in Python files beside it.

A reference is "module.Class", or "repository--module.Class" for code that lies elsewhere; a value is one, null, or a
list of them (a slow tokenizer and a fast one). Nothing here runs or imports the code.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gspo.untrusted import read_bytes, read_json

KEY = "auto_map"
REFERENCE = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)")
ELSEWHERE = "--"
LONGEST_MODULE = 2**24
"""Bytes of a file that is parsed."""


def keep_what_is_there(source: Path, written: Path) -> tuple[list[str], set[Path]]:
    """Takes out of ``written``, a copy, the references whose code is not at ``source``.

    Returns a line for each of them, and the files that the others need, as paths within ``source``.
    """
    try:
        config = read_json(written)
    except (OSError, ValueError):
        return [], set()  # whoever reads it says so
    if not isinstance(config, dict) or not isinstance(config.get(KEY), dict):
        return [], set()
    said: list[str] = []
    files: set[Path] = set()

    def keep(key: str, reference: Any) -> Any:
        """The reference, or None."""
        if reference is None or (isinstance(reference, str) and ELSEWHERE in reference):
            return reference
        needed, missing = code_of(source, reference)
        if missing:
            said.append(f"{source / written.name}: {KEY}'s {key} = {reference!r:.80} is left out: {missing}")
            return None
        files.update(needed)
        return reference

    kept: dict[str, Any] = {}
    for key, value in config[KEY].items():
        kept[key] = [keep(key, item) for item in value] if isinstance(value, list) else keep(key, value)
    if said:
        kept = {key: value for key, value in kept.items() if any(value if isinstance(value, list) else [value])}
        rest = {key: value for key, value in config.items() if key != KEY}
        text = json.dumps(rest | ({KEY: kept} if kept else {}), indent=2)
        written.write_text(text + "\n", encoding="utf-8")
    return said, files


def code_of(source: Path, reference: Any) -> tuple[set[Path], str]:
    """The files that a reference needs, as paths within ``source``; and what is wrong with it, "" where nothing is."""
    match = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    if match is None:
        return set(), "it is not of the form module.Class"
    found: set[Path] = set()
    waiting = [(Path(f"{match[1]}.py"), "")]
    while waiting:
        path, importer = waiting.pop()
        if path in found:
            continue
        if ".." in path.parts:
            return set(), f"{importer} imports from outside of {source.name}"
        if not (source / path).is_file():
            return set(), f"there is no {path}{f', which {importer} imports' if importer else ''}"
        found.add(path)
        waiting += [(imported, str(path)) for imported in relative_imports(source, path)]
    return found, ""


def relative_imports(source: Path, path: Path) -> Iterator[Path]:
    """The files that a module imports from beside it; of a package, its ``__init__.py``, too, where it has one.

    A file that Python cannot parse imports nothing.
    """
    try:
        tree = ast.parse(read_bytes(source / path, LONGEST_MODULE))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        package = path.parent
        for _ in range(node.level - 1):
            package = package.parent if package.parts else Path("..")
        names = [node.module] if node.module else [alias.name for alias in node.names]
        for name in names:
            module = package.joinpath(*name.split("."))
            yield from _files_of(source, module, needed=node.module is not None)


def _files_of(source: Path, module: Path, *, needed: bool) -> Iterator[Path]:
    """``from . import name`` may mean a name of the package itself: its file is not needed then."""
    parents = [parent / "__init__.py" for parent in module.parents if parent.parts]
    yield from (path for path in parents if (source / path).is_file())
    package, file = module / "__init__.py", module.with_name(f"{module.name}.py")
    if (source / package).is_file():
        yield package
    elif needed or (source / file).is_file():
        yield file

"""Malformed configurations. What is accepted is compared with what was written, value by value and type by type."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo.config import RunConfig, dump, load, parse
from megatron_gspo.errors import ConfigError
from tests.fuzz.mutations import (
    BYTE_MUTATIONS,
    HANG_S,
    MUTATIONS,
    VALUES,
    assert_says,
    fuzz,
    mutated,
    mutated_bytes,
)

pytestmark = pytest.mark.timeout(HANG_S)

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart" / "gspo.toml"
TREE = tomllib.loads(EXAMPLE.read_text())
SETTINGS = sorted(
    f"{section}.{name}"
    for section, field in RunConfig.model_fields.items()
    for name in field.annotation.model_fields  # type: ignore[union-attr]
)


def check(written: dict[str, Any], config: RunConfig) -> None:
    """Every setting that was written is the setting that was accepted, and the whole survives a round trip."""
    for section, values in written.items():
        for name, value in values.items():
            assert is_same(value, getattr(getattr(config, section), name)), f"{section}.{name} = {value!r}"
    assert dump(parse(tomllib.loads(dump(config)))) == dump(config)


def storable(tree: Any) -> Any:
    """The tree as TOML can hold it: it has no null, and text is UTF-8."""
    if isinstance(tree, dict):
        return {storable(key): storable(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [storable(value) for value in tree]
    if isinstance(tree, str):
        return tree.encode(errors="replace").decode()
    return "null" if tree is None else tree


def is_same(written: Any, accepted: Any) -> bool:
    if isinstance(written, list):
        pairs = zip(written, accepted, strict=True) if isinstance(accepted, list | tuple) else [(0, 1)]
        return all(is_same(*pair) for pair in pairs)
    if isinstance(written, dict):
        return isinstance(accepted, dict) and all(is_same(v, accepted.get(k)) for k, v in written.items())
    if type(written) is int and type(accepted) is float:
        return written == accepted
    if type(written) is float and type(accepted) is float and math.isnan(written):
        return math.isnan(accepted)
    return type(written) is type(accepted) and written == accepted


@fuzz(300)
@given(MUTATIONS)
@example([("set", 40, 0, True)])
@pytest.mark.parametrize("source", ["quickstart"])
def test_a_mutated_tree_of_settings_is_what_was_written_or_one_line(source: str, mutations: list[Any]) -> None:
    tree = storable(mutated(TREE, mutations))
    if not isinstance(tree, dict):
        return
    written = mutated(tree, [])
    try:
        config = parse(tree, source)
    except ConfigError as error:
        assert_says(error, f"{source}: ")
        return
    check(written, config)


@fuzz(300)
@given(st.sampled_from(SETTINGS), VALUES)
def test_any_value_of_any_setting_is_taken_as_it_is_or_refused(name: str, value: Any) -> None:
    section, _, field = name.partition(".")
    tree = mutated(TREE, [])
    tree.setdefault(section, {})[field] = storable(value)
    written = mutated(tree, [])
    try:
        config = parse(tree)
    except ConfigError as error:
        assert_says(error)
        return
    check(written, config)


@fuzz(150)
@given(BYTE_MUTATIONS)
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b"a = " + b"[" * 20_000)])
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b"a = " + b"9" * 5_000)])
@example([("insert", 0.0, 0, b"\xff\xfe")])
def test_the_bytes_of_a_file_are_the_settings_that_a_toml_reader_finds_or_one_line(
    tmp_path: Path, mutations: list[Any]
) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(mutated_bytes(EXAMPLE.read_bytes(), mutations))
    try:
        config = load(path)
    except ConfigError as error:
        assert_says(error, path)
        return
    check(tomllib.loads(path.read_bytes().decode("utf-8-sig")), config)


@fuzz(150)
@given(st.sampled_from(SETTINGS), st.one_of(VALUES, st.text(max_size=20)), st.booleans())
@example("train.seed", "1\nx = 2", False)
@example("train.overwrite", "True", False)
@example("train.run_dir", "runs/\udcff", False)
@example("train.run_dir", "", True)
@example("train.outer_steps", True, True)
def test_an_override_sets_its_value_or_is_one_line(name: str, value: Any, quoted: bool) -> None:
    """``value`` is what TOML makes of the right side, or the text itself where it is no TOML."""
    text = tomli_w.dumps({"value": storable(value)}).partition("=")[2].strip() if quoted else str(value)
    try:
        config = parse(mutated(TREE, []), overrides=[f"{name}={text}"])
    except ConfigError as error:
        assert_says(error)
        return
    section, _, field = name.partition(".")
    try:
        tree = tomllib.loads(f"value = {text}")
        assert tree.keys() == {"value"}, f"the rest of {text!r} was left out without a word"
        expected = tree["value"]
    except tomllib.TOMLDecodeError:
        expected = {"True": True, "False": False}.get(text.strip(), text.strip())
    assert is_same(expected, getattr(getattr(config, section), field)), (name, text)
    assert dump(parse(tomllib.loads(dump(config)))) == dump(config)

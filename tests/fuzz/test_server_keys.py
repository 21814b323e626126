"""Malformed files of keys: what is accepted is what the file holds, and what is refused is not shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo.calls import SERVER_KEY, SERVER_KEY_FILE, server_key
from megatron_gspo.errors import ConfigError
from tests.fuzz.mutations import BYTE_MUTATIONS, HANG_S, assert_says, fuzz, mutated_bytes

pytestmark = pytest.mark.timeout(HANG_S)

KEY = b"sk-8f3a91c2d7e64b05a1f2\n"


def check(content: bytes, environment: dict[str, str]) -> None:
    try:
        key = server_key(environment)
    except ConfigError as error:
        assert_says(error, SERVER_KEY)
        said, shown = str(error), content.decode("latin-1").strip()
        assert len(shown) < 8 or shown not in said
        return
    text = content.removesuffix(b"\n").removesuffix(b"\r")
    assert key.encode() == text and all(33 <= byte <= 126 for byte in text)


@fuzz(150)
@given(BYTE_MUTATIONS, st.sampled_from([0o600, 0o400, 0o700, 0o644, 0o660, 0o602]))
@example([("double", 0.0, 0, b"x")], 0o600)
def test_a_file_holds_the_key_that_is_read_or_is_refused(tmp_path: Path, mutations: list[object], mode: int) -> None:
    content = mutated_bytes(KEY, mutations)  # type: ignore[arg-type]
    path = tmp_path / "key"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    if mode & 0o077:
        with pytest.raises(ConfigError, match="chmod 600"):
            server_key({SERVER_KEY_FILE: str(path)})
    else:
        check(content, {SERVER_KEY_FILE: str(path)})


@fuzz(100)
@given(st.text(min_size=1, max_size=40).filter(lambda text: "\0" not in text))
@example("\u2028")
@example("\x7f")
def test_a_variable_holds_the_key_that_is_read_or_is_refused(text: str) -> None:
    try:
        assert server_key({SERVER_KEY: text}) == text and all("!" <= character <= "~" for character in text)
    except ConfigError as error:
        assert_says(error, SERVER_KEY)

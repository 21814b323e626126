"""``megatron-gspo convert``: options that cannot be are refused before anything is imported."""

from __future__ import annotations

import argparse

import pytest

from megatron_gspo.commands.convert import add_arguments, check
from megatron_gspo.errors import ConfigError


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["SRC", "DST", *words])


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1e300"])
def test_files_have_a_size_that_can_be(size: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-shard-gb .*: it must be above 0, and at most 1e\+06"):
        check(options("--max-shard-gb", size))


@pytest.mark.parametrize("words", [["--logits"], ["--tokens", "1,2"], ["--layout", "tensor=2"]])
def test_what_belongs_to_a_comparison_does_not_start_a_conversion(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="belong to --verify"):
        check(options(*words))
    check(options("--verify", *words))


def test_logits_are_of_a_policy() -> None:
    check(options("--verify", "--model", "critic"))
    with pytest.raises(ConfigError, match="--logits are a policy's, and --model critic is none"):
        check(options("--verify", "--logits", "--model", "critic"))

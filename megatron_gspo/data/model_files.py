"""What a model directory's JSON files say about its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_gspo import untrusted
from megatron_gspo.errors import DataError


def read_json(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """The object that the file holds; empty when there is no such file. Raises DataError."""
    path = directory / name
    try:
        tree = untrusted.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def find_stop_ids(directory: Path, own: int | None) -> tuple[int, tuple[int, ...]]:
    """(eos_id, stop_ids): the tokenizer's own end-of-sequence id first, else the first one configured."""
    found = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        value = read_json(directory, name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"{directory / name}: eos_token_id = {value!r:.80} is not a token's id, or a list of them")
        found += ids
    if not found:
        raise DataError(
            f"{directory}: no end-of-sequence token: responses could never stop; set eos_token_id in "
            f"generation_config.json"
        )
    return found[0], tuple(sorted(set(found)))


def softmax_rows(directory: Path) -> int | None:
    """``vocab_size`` of ``config.json``; None where there is none. Raises DataError for what is no number of rows."""
    size = read_json(directory).get("vocab_size")
    if size is not None and (type(size) is not int or size < 1):
        raise DataError(f"{directory / 'config.json'}: vocab_size = {size!r:.80} is not a number of tokens")
    return size


def one_line(error: BaseException) -> str:
    """What an error says, on one line; of one that names a key alone, what kind of error it is, too."""
    words = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {words}" if isinstance(error, LookupError) else words or type(error).__name__


def short(text: str) -> str:
    """The text in quotes, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")

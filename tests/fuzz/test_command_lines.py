"""Malformed arguments of `plan` and `compare`, and files of ranks: refused, or taken for what they say."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo import cli
from megatron_gspo.commands import plan as plan_command
from megatron_gspo.compare.plan import parse_sweep
from megatron_gspo.errors import ConfigError
from megatron_gspo.plan.settings import Request
from megatron_gspo.report.ranks import directory, ranks_of, sign_of, write_sign
from tests.fuzz.mutations import (
    BYTE_MUTATIONS,
    HANG_S,
    MUTATIONS,
    as_json,
    assert_says,
    fuzz,
    mutated,
    mutated_bytes,
)

pytestmark = pytest.mark.timeout(HANG_S)

OPTIONS = {
    "--gpus": "gpus",
    "--gpus-per-node": "per_node",
    "--lora": "lora",
    "--prompts": "prompts",
    "--group-size": "group_size",
    "--minibatches": "minibatches",
    "--prompt-tokens": "prompt_tokens",
    "--response-tokens": "response_tokens",
    "--mean-prompt": "mean_prompt",
    "--mean-response": "mean_response",
}
NUMBERS = st.one_of(
    st.sampled_from(["0", "-1", "nan", "inf", "-inf", "1e400", "1.5", "", " 8", "8 ", "0x10", "1_0", "٣", "--", "7e3"]),
    st.integers(-20, 20_000).map(str),
    st.floats().map(str),
    st.text(max_size=6),
)


@pytest.fixture(scope="module")
def parser() -> Any:
    return cli._parser()


def asked(parser: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, Request | None]:
    """(exit status, what was said, the request that the command would search for)."""
    found: list[Request] = []
    monkeypatch.setattr(plan_command, "_propose", lambda options, model, gpu, request, run: found.append(request) or 0)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = cli._run(parser.parse_args(["plan", "qwen3-30b-a3b", *words]))
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, said.getvalue(), found[0] if found else None


@fuzz(150)
@given(st.lists(st.tuples(st.sampled_from(sorted(OPTIONS)), NUMBERS), min_size=1, max_size=3))
@example([("--mean-response", "nan")])
@example([("--mean-prompt", "-5")])
@example([("--mean-response", "1e9")])
@example([("--gpus", "٣")])
@example([("--gpus", "--")])
def test_plans_arguments_are_what_is_planned_for_or_refused(
    parser: Any, monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[str, str]]
) -> None:
    status, said, request = asked(parser, [f"{name}={value}" for name, value in pairs], monkeypatch)
    assert "Traceback" not in said
    if status:
        assert status == 2 and "error: " in said and request is None
        return
    assert request is not None
    work = request.work
    for name, value in dict(pairs).items():
        holder = request if hasattr(request, OPTIONS[name]) else work
        assert getattr(holder, OPTIONS[name]) == float(value), (name, value)
    assert work.prompts % work.minibatches == 0 and request.gpus >= 1
    assert 0 < work.mean_prompt <= work.prompt_tokens and 0 < work.mean_response <= work.response_tokens
    assert math.isfinite(work.mean_prompt + work.mean_response)


@fuzz(200)
@given(
    st.one_of(
        st.builds(
            "{}={}:{}:{}".format, st.sampled_from(["optimizer.lr", "train.seed", "", "lr"]), NUMBERS, NUMBERS, NUMBERS
        ),
        st.text(max_size=30),
    )
)
@example("optimizer.lr=1e-5:inf:3")
@example("optimizer.lr=nan:1:3")
@example("optimizer.lr=1:2:99999999")
def test_a_sweep_has_the_values_that_it_names_or_is_refused(text: str) -> None:
    try:
        sweep = parse_sweep(text)
    except ConfigError as error:
        assert_says(error)
        return
    if sweep is not None:
        first, last, count = text.partition("=")[2].split(":")
        assert len(sweep.values) == int(count) <= 50
        assert math.isclose(sweep.values[0], float(first), rel_tol=1e-3)
        assert math.isclose(sweep.values[-1], float(last), rel_tol=1e-3) and len(set(sweep.values)) == int(count)
        assert all(math.isfinite(value) and value > 0 for value in sweep.values)


@fuzz(200)
@given(MUTATIONS, st.one_of(st.none(), BYTE_MUTATIONS))
def test_what_a_rank_says_of_itself_is_shown_as_it_is_or_left_out(
    tmp_path: Path, mutations: list[Any], bytes_: list[Any] | None
) -> None:
    write_sign(tmp_path, sign_of(0, "node0", "train", 3, 1.0))
    write_sign(tmp_path, sign_of(1, "node1", "train", 3, 1.0))
    path = directory(tmp_path) / "rank-0.json"
    sound = json.loads(path.read_text())
    content = as_json(sound if bytes_ else mutated(sound, mutations))
    path.write_bytes(mutated_bytes(content, bytes_) if bytes_ else content)
    entries = ranks_of(tmp_path, 2)
    assert [entry["rank"] for entry in entries] == [0, 1] and entries[1]["state"] == "alive"
    if entries[0]["state"] != "missing":
        written = json.loads(path.read_bytes())
        assert all(entries[0][name] == written[name] for name in ("host", "pid", "phase", "step"))
    json.dumps(entries, allow_nan=False)

"""Malformed replies of ``/generate``, made from replies that a real server gave (SGLang 0.5.23, in replies.json).

What is accepted is compared with the reply field by field, and the fields with each other.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo.errors import EngineReplyError, RolloutError, SyncError
from megatron_gspo.rollout.engine import Sampling
from megatron_gspo.rollout.sglang.answers import decode_answer
from megatron_gspo.rollout.sglang.control import Servers
from megatron_gspo.rollout.sglang.reply import parse_generation
from megatron_gspo.rollout.sglang.routes import decode_routes
from megatron_gspo.types import Prompt, Rollout, RouteShape
from tests.fuzz.mutations import (
    BYTE_MUTATIONS,
    HANG_S,
    MUTATIONS,
    VALUES,
    as_json,
    assert_says,
    fuzz,
    mutated,
    mutated_bytes,
)

pytestmark = pytest.mark.timeout(HANG_S)

REPLIES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("replies.json").read_text())
VOCABULARY, VERSION, STOP, MOST = 64, 0, 3, 12
REQUEST = "4b1e"
for recorded in REPLIES:
    recorded["meta_info"]["id"] = REQUEST
PROMPT = Prompt("p", "", (5, 6, 7), "")
SAMPLING = Sampling(group_size=2, temperature=1.0, max_tokens=MOST, stop_token_ids=(STOP,))


def parse(reply: Any) -> Rollout:
    return parse_generation(
        reply, PROMPT, 1, SAMPLING, vocab_size=VOCABULARY, weight_version=VERSION, request_id=REQUEST, decode=str
    )


def check(reply: Any) -> None:
    try:
        rollout = parse(reply)
    except EngineReplyError as error:
        assert_says(error, "prompt 'p', sample 1")
        return
    compare(rollout, reply)


def compare(rollout: Rollout, reply: dict[str, Any]) -> None:
    meta, ids = reply["meta_info"], reply["output_ids"]
    assert meta["id"] == REQUEST
    assert all(type(token) is int and 0 <= token < VOCABULARY for token in ids)
    assert rollout.response_ids.dtype == np.int32 and rollout.response_ids.tolist() == ids
    logprobs, named = [e[0] for e in meta["output_token_logprobs"]], [e[1] for e in meta["output_token_logprobs"]]
    assert all(type(value) in (int, float) for value in logprobs) and repr(named) == repr(ids)
    assert rollout.rollout_logprobs.dtype == np.float32
    assert rollout.rollout_logprobs.tolist() == np.array(logprobs, dtype=np.float64).astype(np.float32).tolist()
    assert all(-105 < value <= 1e-6 for value in rollout.rollout_logprobs.tolist())
    assert repr((meta["completion_tokens"], meta["prompt_tokens"])) == repr((len(ids), 3))
    assert rollout.finish_reason == meta["finish_reason"]["type"]
    assert len(ids) <= MOST
    if rollout.finish_reason == "stop":
        assert ids[-1] == STOP == meta["finish_reason"]["matched"] and STOP not in ids[:-1]
    elif rollout.finish_reason == "length":
        assert len(ids) == MOST and STOP not in ids
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"]}]
    assert rollout.weight_versions == tuple(dict.fromkeys(int(span["version"]) for span in spans))
    assert VERSION in rollout.weight_versions and all(type(span["version"]) is str for span in spans)
    assert rollout.text == str(ids) and rollout.prompt is PROMPT and rollout.sample == 1


def test_the_recorded_replies_are_accepted() -> None:
    finishes = [parse(reply).finish_reason for reply in REPLIES]
    assert {"stop", "length"} == set(finishes)
    for reply in REPLIES:
        compare(parse(reply), reply)
        assert "routed_experts" not in reply["meta_info"]


REPLY = st.sampled_from(range(len(REPLIES)))


@fuzz(400)
@given(REPLY, MUTATIONS)
def test_a_mutated_reply_is_what_it_says_or_is_refused(index: int, mutations: list[Any]) -> None:
    check(mutated(REPLIES[index], mutations))


@fuzz(200)
@given(REPLY, st.sampled_from(["output_ids", "output_token_logprobs", "finish_reason", "weight_versions"]), MUTATIONS)
@example(0, "output_token_logprobs", [("set", 2, 0, -1e39)])
@example(0, "output_token_logprobs", [("set", 2, 0, -(10**400))])
def test_what_training_reads_of_a_reply_is_mutated_alone(index: int, field: str, mutations: list[Any]) -> None:
    reply = mutated(REPLIES[index], [])
    holder = reply if field in reply else reply["meta_info"]
    holder[field] = mutated(holder[field], mutations)
    check(reply)


@fuzz(200)
@given(REPLY, BYTE_MUTATIONS)
@example(0, [("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b"[" * 100_000)])
@example(0, [("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b"9" * 5_000)])
@example(0, [("cut", 0.5, 0, b"x")])
def test_mutated_bytes_of_an_answer_are_what_they_say_or_are_refused(index: int, mutations: list[Any]) -> None:
    body = mutated_bytes(as_json(REPLIES[index]), mutations)
    text = body.decode(errors="replace")
    try:
        reply = decode_answer(200, text, "http://server/generate")
    except EngineReplyError as error:
        assert_says(error, "http://server/generate")
        return
    check(reply)
    with pytest.raises(RolloutError, match="HTTP 400"):
        decode_answer(400, text, "http://server/generate")


SHAPE = RouteShape(moe_layers=(False, True, True), top_k=2, num_experts=5)
ROUTES = np.array([[[0, 0], [i % 5, (i + 2) % 5], [(3 * i + 1) % 5, 3 * i % 5]] for i in range(5)], dtype="<i4")


def check_routes(text: Any) -> None:
    """What is accepted is what base64, read by the standard library, holds; and nothing of it would break a step."""
    try:
        routes = decode_routes(text, 6, SHAPE)
    except EngineReplyError as error:
        assert_says(error, "routed_experts")
        return
    wide = np.frombuffer(base64.b64decode(text.encode("ascii"), validate=True), dtype="<i4").reshape(-1, 3, 2)
    assert len(wide) <= 5 and routes.dtype == np.uint8
    for token, layer in np.ndindex(len(wide), 3):
        chosen = wide[token, layer].tolist()
        if layer:
            assert routes[token, layer].tolist() == chosen
            assert len(set(chosen)) == 2 and set(chosen) <= set(range(5))


@fuzz(300)
@given(st.booleans(), BYTE_MUTATIONS)
@example(True, [("drop", 0.5, 0, b"x")])
def test_mutated_routes_are_what_they_say_or_are_refused(encoded: bool, mutations: list[Any]) -> None:
    """Bytes of the text, or of the numbers in it."""
    if encoded:
        check_routes(mutated_bytes(base64.b64encode(ROUTES.tobytes()), mutations).decode(errors="surrogateescape"))
    else:
        check_routes(base64.b64encode(mutated_bytes(ROUTES.tobytes(), mutations)).decode())


@fuzz(50)
@given(VALUES)
def test_what_is_no_text_is_no_routes(value: Any) -> None:
    check_routes(value)


@fuzz(100)
@given(st.sampled_from([{"tp_size": 2, "version": "0.5.23"}, {"weight_version": "7"}]), MUTATIONS, BYTE_MUTATIONS)
def test_a_mutated_status_page_moves_no_version(
    monkeypatch: pytest.MonkeyPatch, page: dict[str, Any], mutations: list[Any], bytes_: list[Any]
) -> None:
    """What weight sync reads of a server: a version that it does not hold, or ranks that it does not have."""
    servers = Servers(["http://server"])
    text = mutated_bytes(as_json(mutated(page, mutations)), bytes_ if mutations[0][1] % 2 else []).decode(
        errors="replace"
    )
    sent: list[bytes] = []

    def call(url: str, body: bytes | None) -> str:
        sent.append(body or b"")
        return text

    monkeypatch.setattr(servers, "_call", call)
    try:
        servers.check_version("7")
        assert str(json.loads(text)["weight_version"]) == "7"
    except SyncError as error:
        assert_says(error)
    try:
        servers.post_tensors(b"payload")
        ranks = json.loads(text)["tp_size"]
        assert type(ranks) is int and json.loads(sent[-1])["serialized_named_tensors"] == ["payload"] * ranks
    except SyncError as error:
        assert_says(error)

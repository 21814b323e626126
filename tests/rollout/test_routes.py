"""Routes become an array only if every number in it can be replayed."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_gspo.errors import EngineReplyError
from megatron_gspo.rollout.sglang.reply import generation_request, parse_generation
from megatron_gspo.rollout.sglang.routes import ROWS_AT_A_TIME, decode_routes
from megatron_gspo.types import Rollout, RouteShape
from tests.rollout.cases import REQUEST, SAMPLING, STOP, prompt, reply

SHAPE = RouteShape(moe_layers=(False, True, True), top_k=2, num_experts=8)
ASKING = replace(SAMPLING, routes=SHAPE)
TOKENS = 6
"""Of ``prompt()`` and a response of three."""


def encode(routes: Any, dtype: str = "<i4") -> str:
    return base64.b64encode(np.asarray(routes, dtype=dtype).tobytes()).decode()


def some_routes(rows: int, shape: RouteShape = SHAPE) -> np.ndarray:
    """[rows, L, K]: different experts, never the same two rows in a row; zeros in dense layers."""
    start = np.arange(rows * len(shape.moe_layers)).reshape(rows, -1, 1) * 5
    routes = (start + 3 * np.arange(shape.top_k)) % shape.num_experts
    routes[:, ~np.array(shape.moe_layers)] = 0
    return routes


def answer(routes: Any = None, **changes: Any) -> dict[str, Any]:
    answer = reply([9, 8, STOP], **changes)
    answer["meta_info"]["routed_experts"] = encode(some_routes(TOKENS - 1)) if routes is None else routes
    return answer


def parse(answer: dict[str, Any]) -> Rollout:
    return parse_generation(answer, prompt(), 1, ASKING, vocab_size=64, weight_version=7, request_id=REQUEST)


def test_a_request_asks_for_routes_only_when_they_are_wanted() -> None:
    assert generation_request(prompt(), [0], ASKING)["return_routed_experts"] is True
    assert "return_routed_experts" not in generation_request(prompt(), [0], SAMPLING)


def test_a_response_keeps_the_routes_of_every_token_but_the_last_in_the_engines_order() -> None:
    routes = parse(answer()).routes
    assert routes is not None and routes.dtype == np.uint8
    assert routes.tolist() == some_routes(5).tolist()
    assert (routes[:, 1:, 0] > routes[:, 1:, 1]).any() and (routes[:, 1:, 0] < routes[:, 1:, 1]).any()


@pytest.mark.parametrize(("experts", "dtype"), [(256, np.uint8), (257, np.uint16), (1024, np.uint16)])
def test_routes_take_one_byte_up_to_256_experts_and_two_above(experts: int, dtype: type) -> None:
    shape = RouteShape((True,), 2, experts)
    sent = [[[0, experts - 1]], [[experts - 1, 255]]]
    routes = decode_routes(encode(sent), 3, shape) if experts > 256 else decode_routes(encode(sent[:1]), 3, shape)
    assert routes.dtype == dtype
    assert routes.tolist() == sent[: len(routes)]


def test_fewer_rows_than_tokens_are_a_capture_that_was_cut() -> None:
    assert decode_routes(encode(some_routes(3)), TOKENS, SHAPE).tolist() == some_routes(3).tolist()
    assert decode_routes("", TOKENS, SHAPE).shape == (0, 3, 2)


def test_what_dense_layers_hold_is_not_looked_at() -> None:
    routes = some_routes(5)
    routes[:, 0] = (-7, 4096)
    assert (decode_routes(encode(routes), TOKENS, SHAPE)[:, 1:] == routes[:, 1:]).all()


def test_a_response_of_two_weight_versions_and_an_aborted_one_have_no_routes() -> None:
    mixed = answer()
    mixed["meta_info"]["weight_versions"] = [
        {"version": "6", "start": 0, "end": 2},
        {"version": "7", "start": 2, "end": 3},
    ]
    assert parse(mixed).routes is None and parse(mixed).weight_versions == (6, 7)
    aborted = reply([9, 8], "abort")
    assert parse(aborted).routes is None and parse(aborted).finish_reason == "abort"


def with_row(token: int, layer: int, experts: tuple[int, int]) -> str:
    routes = some_routes(5)
    routes[token, layer] = experts
    return encode(routes)


MALFORMED = {
    "a row too many": (encode(some_routes(6)), "holds 36 numbers, which is not at most 5 rows"),
    "half a row": (encode(some_routes(5).reshape(-1)[:-1]), "holds 29 numbers"),
    "another top-k": (encode(some_routes(5, replace(SHAPE, top_k=3))), "holds 45 numbers"),
    "an expert too high": (with_row(4, 2, (8, 1)), "sends token 4 to expert 8 in layer 2, which has 8"),
    "a negative expert": (with_row(0, 1, (3, -1)), "sends token 0 to expert -1 in layer 1"),
    "an expert that wraps": (with_row(1, 1, (3, 256 + 5)), "expert 261"),
    "an expert twice": (with_row(3, 2, (5, 5)), r"twice for token 3 in layer 2: \[5, 5\]"),
    "zeros": (with_row(2, 1, (0, 0)), r"token 2 in layer 1: \[0, 0\]; nothing was captured for it"),
    "not base64": ("Zm9v!b==", "no base64"),
    "not ASCII": ("é" * 8, "no base64"),
    "bytes that are no int32": (base64.b64encode(b"abc").decode(), "no base64 of int32"),
    "a list": ([1, 2], "is a list, not base64"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_routes_are_refused_with_their_values(fault: str) -> None:
    routes, text = MALFORMED[fault]
    with pytest.raises(EngineReplyError, match=text) as caught:
        parse(answer(routes))
    assert "prompt 'p', sample 1" in str(caught.value)


def test_a_server_that_captures_no_routes_is_told_of_by_the_flag_that_it_lacks() -> None:
    with pytest.raises(EngineReplyError, match="--enable-return-routed-experts"):
        parse(reply([9, 8, STOP]))


def test_a_repeated_expert_is_found_wherever_it_lies() -> None:
    """Rows are looked at in pieces, and each pair of a row's places is compared."""
    shape = RouteShape((True,), 4, 64)
    rows = ROWS_AT_A_TIME + 3
    sound = np.broadcast_to(np.arange(4), (rows, 1, 4))
    assert decode_routes(encode(sound), rows + 1, shape).shape == (rows, 1, 4)
    for token in (0, ROWS_AT_A_TIME - 1, ROWS_AT_A_TIME, rows - 1):
        for i, j in ((0, 1), (0, 3), (1, 2), (2, 3)):
            routes = sound.copy()
            routes[token, 0, j] = routes[token, 0, i]
            with pytest.raises(EngineReplyError, match=f"twice for token {token} in layer 0"):
                decode_routes(encode(routes), rows + 1, shape)

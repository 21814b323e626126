"""The routes of a response as SGLang sends them: decoded once, checked whole, narrowed.

SGLang files a token's routes under the token's place in its key-value cache, and reads them there when a response is
finished. So a token that was found in the prefix cache has the row of the request that computed it, and a place that
nothing was ever captured for holds zeros, which name expert 0 several times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pybase64

from megatron_gspo.errors import EngineReplyError
from megatron_gspo.types import RouteShape

ROWS_AT_A_TIME = 1 << 16
"""Of a token's layer each, held against one another: a few such arrays stay in the processor's cache."""


def decode_routes(text: Any, tokens: int, shape: RouteShape) -> np.ndarray:
    """[rows, L, K] uint8 or uint16: row i is the routing of token i as input, in the engine's order.

    Args:
        text: base64 of C-ordered little-endian int32 [rows, L, K]; None when the server sent no routes.
        tokens: of prompt and response together. The last one was never an input, so rows <= tokens - 1; fewer rows are
            a capture that was cut, and are those of the first tokens.
        shape: of the model. Rows of dense layers are not looked at.
    Raises:
        EngineReplyError: no routes, another shape, an expert that does not exist, or one named twice in a row.
    """
    wide = _integers(text)
    layers, row = len(shape.moe_layers), len(shape.moe_layers) * shape.top_k
    if wide.size % row or wide.size > (tokens - 1) * row:
        raise EngineReplyError(
            f"routed_experts holds {wide.size} numbers, which is not at most {tokens - 1} rows (one a token but the "
            f"last) of {layers} layers x top-{shape.top_k}: is the served model another one?"
        )
    wide = wide.reshape(-1, layers, shape.top_k)
    if all(shape.moe_layers):
        _check_range(wide, shape, np.arange(layers))
        routes = wide.astype(shape.dtype)
        _check_distinct(routes, np.arange(layers))
    else:
        moe = np.flatnonzero(shape.moe_layers)
        _check_range(wide[:, moe], shape, moe)
        routes = wide.astype(shape.dtype)  # wraps what dense layers hold, which is nothing
        _check_distinct(routes[:, moe], moe)
    return routes


def _integers(text: Any) -> np.ndarray:
    if text is None:
        raise EngineReplyError(
            "the reply has no routed_experts: start the server with --enable-return-routed-experts "
            '(replay.mode = "r3" and replay.engine_routes_every > 0 need them)'
        )
    if not isinstance(text, str):
        raise EngineReplyError(f"routed_experts is a {type(text).__name__}, not base64 text")
    try:
        return np.frombuffer(pybase64.b64decode(text, validate=True), dtype="<i4")
    except ValueError as error:  # binascii.Error is one; so is a size that is no multiple of 4 bytes
        raise EngineReplyError(f"routed_experts is no base64 of int32 numbers: {error}") from None


def _check_range(wide: np.ndarray, shape: RouteShape, layers: np.ndarray) -> None:
    # As unsigned, a negative number is a large one: one comparison for both ends.
    if wide.size and wide.view(np.uint32).max() >= shape.num_experts:
        token, layer, slot = np.argwhere(wide.view(np.uint32) >= shape.num_experts)[0]
        raise EngineReplyError(
            f"routed_experts sends token {token} to expert {wide[token, layer, slot]} in layer {layers[layer]}, "
            f"which has {shape.num_experts}"
        )


def _check_distinct(routes: np.ndarray, layers: np.ndarray) -> None:
    """A row with an expert twice would break the all-to-all that moves tokens to experts."""
    top_k = routes.shape[-1]
    flat = routes.reshape(-1, top_k)
    for start in range(0, len(flat), ROWS_AT_A_TIME):
        columns = np.ascontiguousarray(flat[start : start + ROWS_AT_A_TIME].T)
        repeated = np.zeros(columns.shape[1], dtype=bool)
        for slot in range(1, top_k):
            repeated |= (columns[slot] == columns[:slot]).any(axis=0)
        if repeated.any():
            token, layer = divmod(start + int(repeated.argmax()), len(layers))
            raise EngineReplyError(
                f"routed_experts names an expert twice for token {token} in layer {layers[layer]}: "
                f"{routes[token, layer].tolist()}"
                + ("; nothing was captured for it" if not routes[token, layer].any() else "")
            )

"""``bench replay`` measures what it says: real decoding, real ranks, and steps that do replay."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megatron_gspo.bench.replay import LAYOUT, MODES, Settings, draw_routes, time_decoding, time_moving, time_steps
from megatron_gspo.cli import main
from megatron_gspo.commands.bench_replay import table
from megatron_gspo.types import RouteShape
from tests.pool import RankPool

pytestmark = pytest.mark.distributed

SETTINGS = Settings(tokens=40, layers=4, top_k=2, experts=8, response=10, microbatch=20, hidden=16, repetitions=1)
SHAPE = RouteShape((True,) * 4, 2, 8)


def test_the_whole_benchmark_runs_and_its_table_says_every_figure(ranks: RankPool) -> None:
    moved = ranks.run(LAYOUT.world_size(), time_moving, SETTINGS, SHAPE)[0]
    (step,) = ranks.run(1, time_steps, SETTINGS)
    # Four layers x top-2: 32 bytes of int32 in base64, 8 as kept; two layers of half of the tokens, with a byte each.
    assert moved["bytes"] == {"reply": 43, "kept": 8, "a_rank": 2.5}
    assert list(step["seconds"]) == list(MODES) and list(step["share"]) == list(MODES)[1:]
    assert step["tokens"] == 16 * 8 * 26
    decode = time_decoding(SETTINGS, SHAPE)
    assert 0 < decode.smallest <= decode.median <= decode.largest
    text = table(
        {
            "machine": {"device": "a processor", "cores": 2, "date": "2026-01-02"},
            "settings": asdict(SETTINGS),
            "bytes": moved.pop("bytes"),
            "decode": asdict(decode),
            "move": {name: asdict(spread) for name, spread in moved.items()},
            "step": step,
        }
    )
    assert "43 in the server's reply, 8 kept" in text and f"{decode.median:8.1f} (" in text
    assert all(f"{step['share'][mode]:+7.1%}" in text for mode in ("off", "r2", "r3"))


def test_the_routes_that_are_drawn_are_ones_that_an_engine_could_send() -> None:
    routes = draw_routes(50, SHAPE, 0)
    assert routes.min() == 0 and routes.max() == 7
    assert (routes[..., 0] != routes[..., 1]).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "200"], "--tokens 200: a response has 500, and there is to be one"),
        (["--experts", "4"], "--top-k 8: a token has so many experts, of --experts 4"),
    ],
)
def test_sizes_of_which_there_would_be_nothing_to_measure_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "replay", *words]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"

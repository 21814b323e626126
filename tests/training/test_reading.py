"""Responses kept for reading: whole groups, wherever their responses were trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_gspo.algorithm.advantages import group_advantages
from megatron_gspo.train.reading import spread
from tests.pool import RankPool
from tests.training.stand_in import StandIn
from tests.training.test_faults import endings, settings  # noqa: F401

pytestmark = pytest.mark.timeout(500)
LAYOUTS = {
    "DP2": ["parallel.tensor=1", "parallel.expert=2"],
    "PP2": ["parallel.tensor=1", "parallel.expert=1", "parallel.pipeline=2"],
    "TP2": [],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_groups_are_kept_with_their_reference_answers_in_every_layout(
    ranks: RankPool,
    settings,  # noqa: F811
    quickstart: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    """Four prompts of eight responses a step, of which 12 responses are asked for: two groups. With two data-parallel
    ranks a group's responses are trained on by both."""
    more = ["train.save_rollouts=12", "train.outer_steps=1", *LAYOUTS[layout]]
    with StandIn(quickstart / "model") as server:
        assert endings(ranks, settings(server, *more)) == "finished"
    (file,) = (tmp_path / "run" / "rollouts").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    answers = {}
    for number, line in enumerate((quickstart / "train.jsonl").read_text().splitlines(), 1):
        answers[f"line-{number}"] = json.loads(line)["answer"]
    places = [0, 2]  # of four, those that are evenly spread; of the first leader's share, 0 and 2, both
    assert Counter(line["group"] for line in lines) == dict.fromkeys(places, 8)
    for place in places:
        group = [line for line in lines if line["group"] == place]
        assert [line["sample"] for line in group] == list(range(8))
        assert {line["answer"] for line in group} == {answers[group[0]["prompt_id"]]}
        rewards = np.array([line["reward"] for line in group])
        assert [line["advantage"] for line in group] == pytest.approx(group_advantages(rewards).tolist())
        fresh = place < 2  # two mini-batches of two groups: at the first one's weights, nothing has moved
        for line in group:
            assert (line["new_logprobs"] == line["old_logprobs"]) == (line["ratio"] == 1.0) == fresh
            assert len(line["tokens"]) == len(line["new_logprobs"]) == len(line["rollout_logprobs"])


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(1, [10]), (2, [10, 13]), (3, [10, 12, 14]), (6, [*range(10, 16)]), (9, [*range(10, 16)])],
)
def test_groups_are_spread_evenly(count: int, chosen: list[int]) -> None:
    assert spread(range(10, 16), count) == chosen
    assert spread([], count) == []

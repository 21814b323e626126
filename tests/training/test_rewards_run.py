"""A run whose reward has parts, and leaves some responses ungraded: what is trained on, logged, stored and shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gspo.errors import RewardError
from megatron_gspo.report.payload import payload
from megatron_gspo.report.rundir import RunDirectory
from tests.pool import RankError, RankPool
from tests.training.conftest import MakeConfig
from tests.training.test_runs import responses_of, steps_of, train

REWARD = """
from pathlib import Path
from megatron_gspo.rewards import Score, Ungraded

class Careful:
    def __init__(self, context):
        self.place = Path(context.run_dir)
    def score_group(self, prompt, responses):
        even = [float((response.response_ids % 2 == 0).mean()) for response in responses]
        return [
            Ungraded("sample 1 is nobody's business") if response.sample == 1 and self.place.exists()
            else Score(value, {"even": value, "tokens": len(response.response_ids)})
            for response, value in zip(responses, even, strict=True)
        ]
    def close(self):
        with (self.place / "closed").open("a") as file:
            file.write("x")
"""


def test_ungraded_responses_leave_and_components_are_logged_stored_and_drawn(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    reward = tmp_path / "careful.py"
    reward.write_text(REWARD)
    part = f'{{ function = "{reward}:Careful", weight = 2.0 }}'
    penalty = '{ function = "length", weight = -0.5, options = { end = 1000 } }'
    settings = (
        'reward.function="weighted"',
        f"reward.options={{ parts = [{part}, {penalty}] }}",
        "reward.max_ungraded=0.2",
        "train.save_rollouts=100",
        "parallel.tensor=1",
        "parallel.expert=1",
    )
    one, two = (make_config(*settings, f'train.run_dir="{tmp_path}/run{size}"') for size in (1, 2))
    for size, config in ((1, one), (2, two)):
        ranks.run(size, train, config)
    for line, other in zip(steps_of(one), steps_of(two), strict=True):
        assert line["dropped/ungraded"] == line["dropped/responses"] == 4.0
        even, length = line["reward/component/careful"], line["reward/component/length"]
        assert line["reward/mean"] == pytest.approx(2 * even - 0.5 * length, abs=1e-12)
        assert line["reward/component/careful_even"] == pytest.approx(even, abs=1e-15)
        assert line["reward/component/careful_tokens"] == pytest.approx(line["length/mean"], abs=1e-12)
        for name in (name for name in line if line["outer_step"] == 0 and name.startswith(("reward/", "dropped/"))):
            assert other[name] == pytest.approx(line[name], abs=1e-12), name  # two leaders, the same responses
    stored = responses_of(one)
    size = one.rollout.group_size
    assert {response["sample"] for response in stored} == set(range(size)) - {1}
    for response in stored:
        parts = response["components"]
        assert response["reward"] == pytest.approx(2 * parts["careful"] - 0.5 * parts["length"], abs=1e-12)
    assert (tmp_path / "run2" / "closed").read_text() == "xx"
    page = payload([RunDirectory.open(Path(one.train.run_dir))])
    charts = [chart for section in page["sections"] for chart in section["charts"]]
    (chart,) = [chart for chart in charts if chart["title"] == "Components of the reward"]
    assert [curve["label"] for curve in chart["curves"]] == ["careful", "careful_even", "careful_tokens", "length"]


def test_too_many_ungraded_responses_end_the_run_with_their_number_and_reason(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    reward = tmp_path / "careful.py"
    reward.write_text(REWARD)
    config = make_config(f'reward.function="{reward}:Careful"', "reward.max_ungraded=0.05", "eval.every=0")
    of = 4 * config.rollout.group_size
    with pytest.raises(RankError) as caught:
        ranks.run(2, train, config)
    assert RewardError.__name__ in str(caught.value)
    assert f"left 4 of {of} responses ungraded, more than a share of 0.05" in str(caught.value)
    assert "the first: sample 1 is nobody's business" in str(caught.value)

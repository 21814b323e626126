"""Further stop tokens and special tokens, on their way from the configuration to the server and to the reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.cli import main
from megatron_gspo.config import load
from megatron_gspo.data.tokenizer import load_tokenizer, open_tokenizer
from megatron_gspo.train.inputs import load_inputs
from megatron_gspo.train.sft import load_examples
from tests.training.conftest import QUICKSTART
from tests.training.stand_in import StandIn

EQUALS, EOS, PAD = 10, 11, 12
REWARD = """\
import json
def keep(prompt, response):
    with open({path!r}, "a") as file:
        file.write(json.dumps([response.finish_reason, response.response_ids.tolist(), response.text]) + "\\n")
    return 0.5
"""


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """Where the reward writes what it was shown."""
    (tmp_path / "keep.py").write_text(REWARD.format(path=str(tmp_path / "seen.jsonl")))
    return tmp_path / "seen.jsonl"


@pytest.mark.parametrize("special", [False, True])
def test_eval_stops_at_the_further_tokens_and_shows_the_reward_what_it_asked_for(
    quickstart: Path, tmp_path: Path, seen: Path, special: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []

    def answer(reply: Any, request: Any, count: int) -> Any:
        asked.append(request["sampling_params"]["stop_token_ids"])
        return reply

    with StandIn(quickstart / "model", answer) as server:
        settings = [f'rollout.servers=["{server.url}"]', 'rollout.stop_tokens=["="]', "rollout.max_response_tokens=12"]
        paths = [f'model.path="{quickstart}/model"', f'data.path="{quickstart}/train.jsonl"']
        reward = [f'reward.function="{tmp_path}/keep.py:keep"', f"reward.special_tokens={str(special).lower()}"]
        prompts = [f'data.eval_path="{quickstart}/eval.jsonl"', "eval.prompts=16", "eval.samples=4"]
        config = [str(QUICKSTART / "gspo.toml"), *settings, *paths, *reward, *prompts]
        assert main(["eval", *config, "--out", str(tmp_path / "out"), "--json"]) == 0
    capsys.readouterr()
    assert asked == [[EQUALS, EOS]] * 64
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    assert {ids[-1] for reason, ids, _ in lines if reason == "stop"} == {EQUALS, EOS}
    symbols = [*"0123456789", "=", "<eos>", "<pad>"]
    for reason, ids, text in lines:
        shown = ids[:-1] if reason == "stop" else ids
        assert text == "".join(symbols[i] for i in shown if special or i != PAD)
    assert any(PAD in ids for _, ids, _ in lines)


def test_training_and_fine_tuning_read_the_same_settings(quickstart: Path, tmp_path: Path) -> None:
    settings = [f'model.path="{quickstart}/model"', 'rollout.stop_tokens=["=", 3]', "train.prompts_per_step=16"]
    config = load(QUICKSTART / "gspo.toml", [*settings, f'data.path="{quickstart}/train.jsonl"', 'data.eval_path=""'])
    assert load_inputs(config).tokenizer.stop_ids == (3, EQUALS, EOS)
    assert open_tokenizer(config, quickstart / "model").stop_ids == (3, EQUALS, EOS)
    assert load_tokenizer(quickstart / "model").stop_ids == (EOS,)
    data = f'data.path="{quickstart}/sft.jsonl"'
    examples = load_examples(load(QUICKSTART / "sft.toml", [*settings, data])).completions
    plain = load_examples(load(QUICKSTART / "sft.toml", [settings[0], data])).completions
    for example, other in zip(examples, plain, strict=True):  # what ends at a stop token already gets no other end
        ids = other.completion_ids
        assert example.completion_ids == (ids[:-1] if ids[-2] == 3 else ids) and ids[-1] == EOS

"""A reward model's servers: what they are asked, what is refused, and the check against transformers."""

from __future__ import annotations

import asyncio
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_runs import make_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards import Reward, asking, resolve_reward, score_groups
from megatron_gspo.rewards.registry import check_reward
from megatron_gspo.rewards.reward_model import ChatTemplate, sigmoid
from megatron_gspo.rewards.reward_model_check import compare
from megatron_gspo.rollout.sglang import server
from megatron_gspo.train.reward import find_reward
from megatron_gspo.types import Prompt, Rollout
from tests.unit.answering import HANG, Answer, Asked, answering

PROMPT = Prompt("p", "<policy's own template>6*7=<think>", (1,), "42", asked="6*7=")
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model with a tokenizer of characters."""
    path = tmp_path_factory.mktemp("reward-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        num_labels=2,
    )
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    model.save_pretrained(path)
    words = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {chr(code): code - 29 for code in range(32, 127)} | {"\n": 110}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>", chat_template=CHAT
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def honest(directory: Path) -> Callable[[Any, int], Answer]:
    """transformers' own scores, as a server would send them."""
    model = LlamaForSequenceClassification.from_pretrained(directory).eval()

    def answer(body: Any, number: int) -> Answer:
        with torch.no_grad():
            scores = model(torch.tensor([body["input_ids"]])).logits[0].tolist()
        return Answer({"embedding": scores, "meta_info": {"prompt_tokens": len(body["input_ids"])}})

    return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 0.02)
    monkeypatch.delenv("RANK", raising=False)


def group(*texts: str) -> list[Rollout]:
    return [
        Rollout(PROMPT, i, np.ones(2, np.int32), np.zeros(2, np.float32), "stop", (0,), text)
        for i, text in enumerate(texts)
    ]


def made(asked: Asked, directory: Path, **options: Any) -> Reward:
    options = {"url": asked.url, "model": str(directory), **options}
    return resolve_reward(RewardConfig(function="reward_model", options=options))


def shifted(honest: Callable[[Any, int], Answer], by: Callable[[int], float]) -> Callable[[Any, int], Answer]:
    def answer(body: Any, number: int) -> Answer:
        found = honest(body, number).body
        return Answer({**found, "embedding": [score + by(number) for score in found["embedding"]]})

    return answer


def text_of(ids: list[int]) -> str:
    return "".join("\n" if i == 110 else chr(i + 29) for i in ids)


def test_scores_are_of_the_models_own_template_and_stay_as_they_are(directory: Path, honest: Any) -> None:
    with answering(honest) as asked:
        reward = made(asked, directory, label=1)
        assert len(asked.bodies) == 5 and set(asked.paths) == {"/classify"}  # the check
        (found,) = asyncio.run(score_groups(reward, [group("42", "I say 41")]))
        bodies = sorted(asked.bodies[5:], key=lambda body: len(body["input_ids"]))
    assert [text_of(body["input_ids"]) for body in bodies] == [
        "<user>6*7=\n<assistant>42\n",
        "<user>6*7=\n<assistant>I say 41\n",
    ]
    expected = [honest(body, 0).body["embedding"][1] for body in bodies]
    np.testing.assert_array_equal(found.rewards_G, expected)
    assert [table["score"] for table in found.components_G] == expected
    assert reward.range == (-math.inf, math.inf) and math.isnan(reward.worst)


def test_a_sigmoid_brings_scores_to_the_unit_interval(directory: Path, honest: Any) -> None:
    with answering(honest) as asked:
        reward = made(asked, directory, transform="sigmoid")
        (found,) = asyncio.run(score_groups(reward, [group("42")]))
    score = found.components_G[0]["score"]
    assert reward.range == (0.0, 1.0)
    np.testing.assert_allclose(found.rewards_G, [1 / (1 + math.exp(-score))], rtol=0, atol=1e-15)
    assert [sigmoid(x) for x in (-1000, 1000, 0)] == [0, 1, 0.5]


def test_the_model_may_be_shown_the_answer_alone(directory: Path, honest: Any) -> None:
    with answering(honest) as asked:
        reward = made(asked, directory, thinking=False, check=False)
        asyncio.run(score_groups(reward, [group("hm</think>42")]))
        asyncio.run(score_groups(reward, [group("hm, never ends")]))
    assert [text_of(body["input_ids"]) for body in asked.bodies] == [
        "<user>6*7=\n<assistant>42\n",
        "<user>6*7=\n<assistant>\n",
    ]


def test_a_head_with_a_bias_is_refused_with_both_numbers_and_what_to_do(directory: Path, honest: Any) -> None:
    with answering(shifted(honest, lambda number: 0.0229)) as asked:
        with pytest.raises(ConfigError, match=r"all differ by 0\.0229: the server's head has a bias") as caught:
            made(asked, directory)
        assert "gives a text" in str(caught.value) and "and transformers" in str(caught.value)
        assert "server.py" in str(caught.value)
        made(asked, directory, check=False)  # whoever knows better


def test_scores_of_another_model_are_refused_and_rounding_is_not(directory: Path, honest: Any) -> None:
    with answering(shifted(honest, lambda number: 0.5 * (number % 2))) as asked:
        with pytest.raises(ConfigError, match=r"gives a text .*, and transformers") as caught:
            made(asked, directory)
        assert "bias" not in str(caught.value)
    with answering(shifted(honest, lambda number: 0.005 * (-1) ** number)) as asked:
        made(asked, directory)
        with pytest.raises(ConfigError, match="and transformers"):
            made(asked, directory, tolerance=0.001)


def test_the_tolerance_is_relative_to_large_scores() -> None:
    expected = np.array([100.0, -50.0, 3.0])
    compare("u", expected + np.array([1.9, 0.5, -0.01]), expected, 0.02)
    with pytest.raises(ConfigError, match=r"u gives a text 102\.1, and transformers 100"):
        compare("u", expected + np.array([2.1, 0.5, -0.01]), expected, 0.02)
    with pytest.raises(ConfigError, match="bias"):
        compare("u", expected + 2e-4, expected, 0.02)
    compare("u", expected + 5e-5, expected, 0.02)


def test_every_server_is_held_against_it_and_only_by_the_first_rank(
    directory: Path, honest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(honest) as good, answering(shifted(honest, lambda number: 1.0)) as bad:
        with pytest.raises(ConfigError, match=bad.url):
            made(good, directory, url=[good.url, bad.url])
        monkeypatch.setenv("RANK", "1")
        made(good, directory, url=[good.url, bad.url])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Answer(b"no", 401), "gives no score: HTTP 401"),
        (Answer({"error": "x"}), "gives no score: no score"),
        (Answer({"embedding": [None, None]}), "its score is None"),
        (Answer({"embedding": [True, True]}), "its score is True"),
        (Answer({"embedding": [1.0, 1.0], "meta_info": {"prompt_tokens": 3}}), "it read 3 tokens of"),
        (Answer(b"{"), "gives no score"),
    ],
)
def test_a_server_that_gives_no_score_at_the_start_is_refused(directory: Path, said: Answer, message: str) -> None:
    with answering(lambda body, number: said) as asked, pytest.raises(ConfigError, match=message):
        made(asked, directory)


def test_a_server_that_fails_later_leaves_responses_ungraded(directory: Path) -> None:
    said: dict[int, Answer | str] = {0: Answer(b"busy", 503), 1: Answer(b"too long", 400), 2: HANG}
    with answering(lambda body, number: said[number]) as asked:
        reward = made(asked, directory, check=False, retries=1, timeout_s=0.2)
        (found,) = asyncio.run(score_groups(reward, [group("a")]))
        assert "HTTP 400: too long" in found.ungraded_G[0]
        said[3] = HANG
        (found,) = asyncio.run(score_groups(reward, [group("a")]))
        assert "timed out after 0.2 s (asked 2 times)" in found.ungraded_G[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/nowhere"}, "is no directory"),
        ({"transform": "tanh"}, "transform = 'tanh': Input should be 'identity' or 'sigmoid'"),
        ({"label": -1}, "label = -1"),
        ({"tolerance": 0}, "tolerance = 0"),
        ({"url": "host:1"}, "a url is"),
        ({"key_variable": "NO_SUCH"}, "NO_SUCH"),
    ],
)
def test_options_that_are_none_are_refused_without_a_server(
    directory: Path, options: dict[str, Any], message: str
) -> None:
    given = {"url": "http://h:1", "model": str(directory), **options}
    with pytest.raises(ConfigError, match=message):
        check_reward(RewardConfig(function="reward_model", options=given))


def test_texts_are_cut_as_the_tokenizers_file_says_whatever_the_models_type(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # whose class would drop the spaces
    turns = [{"role": "user", "content": "6 * 7"}]
    found = ChatTemplate(str(tmp_path)).ids(turns, "It is 42")
    assert text_of(found) == "<user>6 * 7\n<assistant>It is 42\n"


def test_a_tokenizer_without_a_template_is_refused(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="has no chat template"):
        resolve_reward(RewardConfig(function="reward_model", options={"url": "http://h:1", "model": str(tmp_path)}))


def test_a_truncated_response_cannot_get_0_where_0_may_be_praise(directory: Path, tmp_path: Path) -> None:
    options = {"url": "http://h:1", "model": str(directory), "check": False}
    config = make_config(tmp_path)
    config = config.model_copy(
        update={
            "reward": RewardConfig(function="reward_model", options=options),
            "rollout": config.rollout.model_copy(update={"on_truncated": "zero"}),
        }
    )

    class Plain:
        def decode(self, ids: Any, skip_special: bool = True) -> str:
            return ""

    tokenizer: Any = Plain()
    with pytest.raises(ConfigError, match=r"on_truncated = .zero. .*\(-inf, inf\), where 0 is not the worst"):
        find_reward(config, tokenizer)
    find_reward(config, tokenizer, trains=False)


# The mend

HEAD = """
import torch
class {name}:
    def __init__(self, bias):
        self.score = torch.nn.Linear(4, 1, bias=bias)
        if bias:
            self.score.bias.data.fill_(0.5)
"""


def test_heads_start_without_a_bias_in_sglangs_scoring_models_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sglang" / "srt" / "models"
    package.mkdir(parents=True)
    for where in (package, package.parent, package.parent.parent):
        (where / "__init__.py").touch()
    (package / "qwen3_classification.py").write_text(HEAD.format(name="Qwen3ForSequenceClassification"))
    (package / "other.py").write_text(HEAD.format(name="OtherForSequenceClassification"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [server.HeadsWithoutBias(), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        changed: Any = importlib.import_module("sglang.srt.models.qwen3_classification")
        other: Any = importlib.import_module("sglang.srt.models.other")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            del sys.modules[name]
    assert float(changed.Qwen3ForSequenceClassification(True).score.bias) == 0.0
    assert changed.Qwen3ForSequenceClassification(False).score.bias is None
    assert float(other.OtherForSequenceClassification(True).score.bias) == 0.5

"""Rewards that a real SGLang server gives: a reward model's scores, and a judge's grades."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from megatron_gspo.calls import call
from megatron_gspo.config import RewardConfig, RunConfig, parse
from megatron_gspo.rewards import RewardContext, resolve_reward, score_groups
from megatron_gspo.rewards.judge_text import TEMPLATE, fill
from megatron_gspo.rollout.sglang import server
from megatron_gspo.rollout.sglang.launcher import find_server_python
from megatron_gspo.runs.reward_serving import started
from megatron_gspo.types import Prompt, Rollout
from tests.rollout.conftest import require_sglang

pytestmark = [pytest.mark.rollout, pytest.mark.slow_suite]

CHARACTERS = sorted({chr(code) for code in range(32, 127)} | {"\n"})
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
FRAME: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARGUMENTS = (
    *("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--skip-server-warmup", "--sleep-on-idle"),
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--max-running-requests", "16", "--max-total-tokens", "16384", "--mem-fraction-static", "0.5"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    "--disable-overlap-schedule",
)


def make_model(directory: Path, family: str, *, scores: bool) -> Any:
    """A tiny random model and a tokenizer of characters in a directory; the model."""
    torch.manual_seed(0)
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    config = AutoConfig.for_model(family, **FRAME, **({"num_labels": 1} if scores else {}))
    model = kind.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(directory)
    words = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {text: 3 + i for i, text in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>", chat_template=CHAT
    )
    fast.save_pretrained(directory)
    return model, fast


@contextlib.contextmanager
def serving(directory: Path, logs: Path, *more: str) -> Iterator[str]:
    """A server of that model, as docs/rewards.md starts one."""
    require_sglang()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(find_server_python()), str(Path(server.__file__)), "--model-path", str(directory), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    url = f"http://127.0.0.1:{port}"
    with (logs / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*words, *ARGUMENTS, *more], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                if call(f"{url}/health", timeout_s=5).status == 200:
                    break
            assert process.poll() is None, (logs / "server.log").read_text()[-2000:]
            time.sleep(1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def group(*texts: str) -> list[Rollout]:
    prompt = Prompt("p", "<user>6*7=\n", (1,), "42", asked="6*7=")
    return [
        Rollout(prompt, i, np.ones(2, np.int32), np.zeros(2, np.float32), "stop", (0,), text)
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_served_reward_model_gives_transformers_scores(tmp_path: Path, family: str) -> None:
    directory = tmp_path / "model"
    model, tokenizer = make_model(directory, family, scores=True)
    texts = ("42", "I would say that it is 41.", "x" * 200)
    said = [[{"role": "user", "content": "6*7="}, {"role": "assistant", "content": text}] for text in texts]
    ids = [
        tokenizer.encode(tokenizer.apply_chat_template(one, tokenize=False), add_special_tokens=False) for one in said
    ]
    with torch.no_grad():
        expected = [float(model(torch.tensor([one])).logits[0, 0]) for one in ids]
    with serving(directory, tmp_path, "--is-embedding") as url:
        options = {"url": url, "model": str(directory), "check": True, "tolerance": 1e-4}
        reward = resolve_reward(RewardConfig(function="reward_model", options=options))
        (found,) = asyncio.run(score_groups(reward, [group(*texts)]))
        squashed = resolve_reward(RewardConfig(function="reward_model", options={**options, "transform": "sigmoid"}))
        (small,) = asyncio.run(score_groups(squashed, [group(*texts)]))
    print(f"{family}: largest difference {np.abs(found.rewards_G - expected).max():.3g}")
    np.testing.assert_allclose(found.rewards_G, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(small.rewards_G, 1 / (1 + np.exp(-np.array(expected))), rtol=0, atol=2e-6)
    assert np.std(expected) > 0.01


def test_a_local_server_judges(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    _, tokenizer = make_model(directory, "qwen3", scores=False)
    digit = {"pattern": r"(\d)", "scale": [0, 9], "extra": {"temperature": 1.0}, "max_tokens": 96}
    with serving(directory, tmp_path) as url:
        options = {"url": f"{url}/v1/chat/completions", "model": "judge", "price": [1e6, 0], **digit}
        reward = resolve_reward(RewardConfig(function="judge", options=options, timeout_s=60))
        drawn = group("42", "41", "42")
        (found,) = asyncio.run(score_groups(reward, [drawn]))
    assert found.ungraded_G == ()
    nines = found.rewards_G * 9
    np.testing.assert_allclose(nines, np.round(nines), atol=1e-9)
    assert found.rewards_G[0] == found.rewards_G[2] and found.components_G[2]["asked"] == 0
    asked = [{"role": "user", "content": fill(TEMPLATE, drawn[0].prompt, "42")}]
    count = len(tokenizer.encode(tokenizer.apply_chat_template(asked, tokenize=False), add_special_tokens=False))
    first = found.components_G[0]
    if first["asked"] == 1:  # a judge that draws at random may have to be reminded
        assert first["prompt_tokens"] == count and 1 <= first["completion_tokens"] <= 96
    assert first["cost"] == first["prompt_tokens"] >= count


def own_server(directory: Path, run: Path, kind: str, **reward: Any) -> RunConfig:
    """A configuration whose reward asks a server of ``directory`` that is started with it."""
    tree = {
        "model": {"path": "m"},
        "data": {"path": "d"},
        "train": {"run_dir": str(run), "microbatch_tokens": 4096},
        "reward": {"function": kind, "timeout_s": 60.0, **reward},
        "reward_server": {"model": str(directory), "kind": kind},
    }
    return parse(tree, "a test", [])


def test_a_reward_model_that_a_run_starts_scores_as_transformers_does_and_after_its_death_too(tmp_path: Path) -> None:
    require_sglang()
    directory, texts, said = tmp_path / "model", ("42", "I would say that it is 41."), list[str]()
    model, tokenizer = make_model(directory, "qwen3", scores=True)
    turns = [[{"role": "user", "content": "6*7="}, {"role": "assistant", "content": text}] for text in texts]
    rows = [
        tokenizer.encode(tokenizer.apply_chat_template(one, tokenize=False), add_special_tokens=False) for one in turns
    ]
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]
    config = own_server(directory, tmp_path / "run", "reward_model", options={"check": True, "tolerance": 1e-4})
    logs = tmp_path / "logs"
    with started(config, logs, ranks=0, say=said.append) as servers:
        reward = resolve_reward(config.reward, RewardContext.of(config, servers=servers))
        (found,) = asyncio.run(score_groups(reward, [group(*texts)]))
        np.testing.assert_allclose(found.rewards_G, expected, rtol=0, atol=2e-6)
        assert call(f"{servers.urls[0]}/classify", b'{"input_ids": [5]}', timeout_s=10).status == 401, "without the key"
        (server_process,) = [child for child in psutil.Process().children() if str(directory) in child.cmdline()]
        os.killpg(server_process.pid, signal.SIGKILL)
        (found,) = asyncio.run(score_groups(reward, [group(*texts)]))
        np.testing.assert_allclose(found.rewards_G, expected, rtol=0, atol=2e-6)
        assert (logs / "sglang-0.1.log").exists() and "it is started again (1 of 10 times)" in said[-1]
    assert not (logs / "key").exists()


def test_a_judge_that_a_run_starts_grades(tmp_path: Path) -> None:
    require_sglang()
    directory = tmp_path / "model"
    make_model(directory, "qwen3", scores=False)
    digit = {"pattern": r"(\d)", "scale": [0, 9], "extra": {"temperature": 1.0}, "max_tokens": 96}
    config = own_server(directory, tmp_path / "run", "judge", options=digit)
    with started(config, tmp_path / "logs", ranks=0, say=print) as servers:
        reward = resolve_reward(config.reward, RewardContext.of(config, servers=servers))
        (found,) = asyncio.run(score_groups(reward, [group("42", "41")]))
    assert found.ungraded_G == () and all(0.0 <= grade <= 1.0 for grade in found.rewards_G)
    np.testing.assert_allclose(found.rewards_G * 9, np.round(found.rewards_G * 9), atol=1e-9)

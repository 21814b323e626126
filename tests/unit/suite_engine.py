"""A stand-in for servers and a byte-level model, so that ``eval --suite`` runs whole within a process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest

from megatron_gspo.cli import main
from megatron_gspo.evaluation import examine
from megatron_gspo.rewards import registry
from megatron_gspo.rollout.engine import Progress, Sampling, rollout_seed
from megatron_gspo.types import Prompt, Rollout

EOS = 256
KILLED = 9
"""Exit status of a process that dies within an evaluation."""
Says = Callable[[Prompt, int], str]
"""(prompt, a number drawn from the response's seed) -> what is answered."""


class StandInEngine:
    """Answers prompts in an order of its own. ``dies_after``: groups after which it is as if it were killed."""

    version, repeatable = "0.5.23", True
    says: Says = staticmethod(lambda prompt, draw: str(draw))
    dies_after: int | None = None
    asked: ClassVar[list[str]]
    sampling: ClassVar[list[Sampling]]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def rollout_groups(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        weight_version: int,
        progress: Progress | None = None,
        first: int = 0,
    ) -> list[list[Rollout]]:
        assert sampling.seed is not None
        type(self).sampling.append(sampling)
        groups = {}
        for count, prompt in enumerate(reversed(prompts)):
            if count == self.dies_after:
                os._exit(KILLED)
            type(self).asked.append(prompt.id)
            groups[prompt.id] = [self.respond(prompt, sample, sampling) for sample in range(sampling.group_size)]
            if progress is not None:
                progress(groups[prompt.id])
        return [groups[prompt.id] for prompt in prompts]

    def respond(self, prompt: Prompt, sample: int, sampling: Sampling) -> Rollout:
        assert sampling.seed is not None
        draw = rollout_seed(sampling.seed, sampling.outer_step, prompt.id, sample)
        text = type(self).says(prompt, draw)
        ids = np.array([*text.encode(), EOS], dtype=np.int32)
        return Rollout(prompt, sample, ids, np.zeros(len(ids), np.float32), "stop", (0,), text=text)


@contextlib.contextmanager
def standing_in(says: Says, dies_after: int | None = None) -> Iterator[type[StandInEngine]]:
    """``eval`` gets this engine, without servers."""

    class Engine(StandInEngine):
        pass

    Engine.asked, Engine.sampling = [], []
    Engine.says, Engine.dies_after = staticmethod(says), dies_after

    @contextlib.contextmanager
    def no_servers(*arguments: Any) -> Iterator[tuple[tuple[str, ...], str, None]]:
        yield ("http://stand-in",), "", None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examine, "_servers", no_servers)
        patch.setattr(examine, "make_engine", lambda *arguments, **named: Engine())
        patch.setitem(registry.BUILTIN_REWARDS, "code", "tests.unit.suite_rewards:code")
        yield Engine


def killed_after(groups: int, says: Says, arguments: Sequence[str]) -> None:
    """``eval`` in a process that is gone, without a word, once so many groups have arrived and were judged or not."""
    child = os.fork()
    if not child:
        try:
            with standing_in(says, groups):
                main(["eval", *arguments])
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == KILLED


def byte_tokenizer() -> Any:
    """Every byte is a token, and 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)} | {"<eos>": EOS}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def write_model(directory: Path, positions: int = 4096, *, weights: bool = False) -> Path:
    """A tiny Qwen3-MoE with that tokenizer; without ``weights`` its configuration alone."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=EOS + 1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=64**-0.5,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,
        eos_token_id=EOS,
        pad_token_id=None,
        bos_token_id=None,
        architectures=["Qwen3MoeForCausalLM"],
    )
    directory.mkdir(parents=True, exist_ok=True)
    if weights:
        import torch
        from transformers import Qwen3MoeForCausalLM

        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(directory)
    else:
        (directory / "config.json").write_text(json.dumps(config.to_dict()))
    byte_tokenizer().save_pretrained(directory)
    return directory

"""A reward model: a sequence classifier that an SGLang server holds, asked at ``/classify``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.asking import Asking, NoAnswerError, check_asking
from megatron_gspo.rewards.interface import RewardContext, RewardResult, Score, Ungraded
from megatron_gspo.rewards.registry import NO_CONTEXT
from megatron_gspo.rewards.reward_model_check import hold_against_transformers, score_of
from megatron_gspo.rewards.served import PATHS, Place, find_place
from megatron_gspo.rewards.thinking import after_thinking
from megatron_gspo.types import Prompt, Rollout


class RewardModel(Asking):
    """The score of (turns, response) under the reward model's own chat template; ``sigmoid`` brings it to (0, 1).

    Component: ``score``, before the transform. At the start the servers' scores of a few texts are held against
    transformers', where the model's directory is readable here.

    Args:
        url: of a server, "http://HOST:PORT", or several that hold the same model, asked in turn. Without one, the
            servers that the run starts (``[reward_server]``), whose model it is then.
        model: its Hugging Face directory: the tokenizer, and what the check loads.
        transform: "identity", with the range (-inf, inf), or "sigmoid".
        label: which of the model's scores is the reward.
        thinking: whether the model is shown a response's thinking too, and not only what follows it.
        check: whether scores are held against transformers'; when absent, where its weights are 4 GiB at most.
        tolerance: by how much scores may differ, relative to the larger of 1 and the score.
    """

    def __init__(
        self,
        url: str | Sequence[str] = "",
        model: str = "",
        *,
        transform: Literal["identity", "sigmoid"] = "identity",
        label: int = 0,
        thinking: bool = True,
        check: bool | None = None,
        tolerance: float = 0.02,
        key_variable: str = "",
        key_file: str = "",
        timeout_s: float = 20.0,
        retries: int = 4,
        context: RewardContext = NO_CONTEXT,
    ) -> None:
        check_asking(NAME, timeout_s, retries)
        place = _place(url, model, key_variable, key_file, context)
        _check_score(transform, label, tolerance)
        self.range = (0.0, 1.0) if transform == "sigmoid" else (-math.inf, math.inf)
        self._sigmoid, self._label, self._thinking = transform == "sigmoid", label, thinking
        self.limits_itself = place.own  # a server that is started again is waited for
        self._template = ChatTemplate(place.model)
        if check is not False and place.urls:
            samples = [self._template.ids(turns, text) for turns, text in CHECKED]
            model_path, insisted = Path(place.model), check is True
            hold_against_transformers(place.urls, place.key, model_path, samples, label, tolerance, insisted=insisted)
        self._service = place.service([f"{one}{PATHS[NAME]}" for one in place.urls], timeout_s, retries)

    @staticmethod
    def check(url: Any = "", model: Any = "", context: RewardContext = NO_CONTEXT, **options: Any) -> None:
        """What can be said without asking the server. Raises ConfigError."""
        check_asking(NAME, options.get("timeout_s", 20.0), options.get("retries", 4))
        _place(url, model, options.get("key_variable", ""), options.get("key_file", ""), context)
        _check_score(options.get("transform", "identity"), options.get("label", 0), options.get("tolerance", 0.02))

    async def __call__(self, prompt: Prompt, response: Rollout) -> RewardResult:
        text = response.text if self._thinking else after_thinking(prompt.text, response.text) or ""
        try:
            ids = self._template.ids(prompt.turns, text)
            score = score_of(await self._service.ask({"input_ids": ids}), self._label, len(ids))
        except NoAnswerError as error:
            return Ungraded(str(error))
        return Score(sigmoid(score) if self._sigmoid else score, {"score": score})


class ChatTemplate:
    """A reward model's own tokenizer and chat template. Raises ConfigError where there is none."""

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # By the model's type AutoTokenizer takes a class that may cut texts otherwise than the file says.
        kind: Any = PreTrainedTokenizerFast if (Path(model) / "tokenizer.json").is_file() else AutoTokenizer
        try:
            self._tokenizer: Any = kind.from_pretrained(model, local_files_only=True)
        except Exception as error:  # whatever a broken directory makes of it
            raise ConfigError(f"reward {NAME!r}: the tokenizer of {model} cannot be read: {error}") from None
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError(f"reward {NAME!r}: the tokenizer of {model} has no chat template")

    def ids(self, turns: list[dict[str, Any]], response: str) -> list[int]:
        """Token ids of the conversation with the response as its last turn. Raises NoAnswerError where the template
        refuses it."""
        try:
            said = [*turns, {"role": "assistant", "content": response}]
            text = self._tokenizer.apply_chat_template(said, tokenize=False)
            return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]
        except Exception as error:  # templates raise what they like
            raise NoAnswerError(f"the reward model's chat template: {type(error).__name__}: {error}") from None


def sigmoid(score: float) -> float:
    """1 / (1 + exp(-score)), without overflow."""
    small = math.exp(-abs(score))
    return 1 / (1 + small) if score >= 0 else small / (1 + small)


NAME = "reward_model"
CHECKED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"role": "user", "content": "What is 7 times 6?"}], "42"),
    ([{"role": "user", "content": "What is 7 times 6?"}], "It is 41, I think, but I am not sure of it."),
    ([{"role": "user", "content": "Name a river."}], "The Nile flows north. " * 8),
    ([{"role": "user", "content": "Say nothing but yes."}], "no"),
    ([{"role": "user", "content": "Write two lines about the sea."}], "It is wide.\nIt is blue."),
]
"""What is scored at the start by both."""


def _place(url: Any, model: Any, key_variable: str, key_file: str, context: RewardContext) -> Place:
    """Where it asks. Raises ConfigError."""
    place = find_place(NAME, url, model, key_variable, key_file, context)
    place = replace(place, urls=tuple(one.rstrip("/") for one in place.urls))
    if not (isinstance(place.model, str) and place.model and Path(place.model).is_dir()):
        setting = "reward_server.model" if place.own else f"reward {NAME!r}: model"
        raise ConfigError(f"{setting} = {place.model!r} is no directory; its tokenizer is needed here")
    return place


def _check_score(transform: Any, label: Any, tolerance: Any) -> None:
    if transform not in ("identity", "sigmoid"):
        raise ConfigError(f"reward {NAME!r}: transform = {transform!r}, neither identity nor sigmoid")
    if not isinstance(label, int) or label < 0 or not tolerance > 0:
        raise ConfigError(f"reward {NAME!r}: label = {label!r} is 0 or more, and tolerance = {tolerance!r} above 0")

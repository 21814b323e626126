"""What an outer step has to do: prompts, responses and how long they are."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.errors import ConfigError


@dataclass(frozen=True)
class Workload:
    """One outer step.

    Of responses only the mean and the longest are given. Lengths are taken to be spread so that (1 - s / longest)^k of
    them are longer than s tokens, with the k that gives the mean: all of one length (k = 0), evenly from 0 to the
    longest (k = 1, a mean of half of it), or mostly short ones with a thin tail (k above 1).
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    """Of the longest prompt."""
    response_tokens: int
    """Of the longest response: ``rollout.max_response_tokens``."""
    mean_prompt: float
    mean_response: float
    minibatches: int = 4
    reference: bool = False
    """Whether a reference policy's logprobs are needed."""
    critic: int = 0
    """Times that a critic is trained on each mini-batch; 0: there is none."""

    def __post_init__(self) -> None:
        if not 0 < self.mean_response <= self.response_tokens or not 0 < self.mean_prompt <= self.prompt_tokens:
            raise ConfigError(
                f"a mean prompt of {self.mean_prompt:g} and a mean response of {self.mean_response:g} tokens: each is "
                f"above 0 and at most the longest, {self.prompt_tokens} and {self.response_tokens}"
            )

    @property
    def sequences(self) -> int:
        """Responses of a step."""
        return self.prompts * self.group_size

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def mean_length(self) -> float:
        """Tokens of a prompt and its response."""
        return self.mean_prompt + self.mean_response

    @property
    def tokens(self) -> float:
        """Of all prompts with their responses: what training sees."""
        return self.sequences * self.mean_length

    @property
    def thinness(self) -> float:
        """k."""
        return self.response_tokens / self.mean_response - 1

    @property
    def square_length(self) -> float:
        """Mean of the squared length of a prompt with its response; prompts are taken to be of one length.

        E[s^2] = 2 longest^2 / ((k + 1) (k + 2)).
        """
        k = self.thinness
        squared = 2 * self.response_tokens**2 / ((k + 1) * (k + 2))
        return self.mean_prompt**2 + 2 * self.mean_prompt * self.mean_response + squared

    def running(self, token: float) -> float:
        """Share of responses that are longer than ``token`` tokens."""
        return (1 - min(token, self.response_tokens) / self.response_tokens) ** self.thinness

"""What becomes of a logprob, a loss or a gradient that is not finite: it is named, and the optimizer does not move."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from megatron_gspo.algorithm.objective import find_non_finite
from megatron_gspo.config import TrainConfig
from megatron_gspo.errors import NonFiniteError
from megatron_gspo.megatron.diagnosis import bad_gradients, bad_layer, bad_weights
from megatron_gspo.megatron.network import Network
from megatron_gspo.parallel.exchange import gather_objects
from megatron_gspo.types import PackedBatch, TokenShard

_PROMPT = re.compile(r"prompt (\d+) of this outer step")


def non_finite_error(values_T: torch.Tensor, shard: TokenShard, policy: str) -> NonFiniteError | None:
    """The error of the first response with a NaN or an infinity among its logprobs; None when all are finite."""
    found = find_non_finite(values_T, shard.mask_T, shard)
    if found is None:
        return None
    group, sample = found
    return NonFiniteError(f"prompt {group} of this outer step, response {sample}: a {policy} logprob is not finite")


class Guard:
    """Stands around what computes an update, and does with a NonFiniteError what ``train.on_non_finite`` says.

    Every rank enters it with the same error or none: such errors are agreed on before the optimizer moves.
    """

    def __init__(
        self, train: TrainConfig, model: Network, prompts: Mapping[int, str], note: Callable[[str], None], where: str
    ) -> None:
        """``prompts``: ids by place in the outer step, of those that this rank fetched; ``where``: which step it is."""
        self._train, self._model, self._prompts, self._note, self._where = train, model, prompts, note, where
        self.struck = False
        """Whether the last block that was entered has failed and is skipped."""

    @contextlib.contextmanager
    def __call__(self, batches: Sequence[PackedBatch]) -> Iterator[None]:
        """Around passes over these micro-batches. Collective where one fails. Raises NonFiniteError, or skips."""
        self.struck = False
        try:
            yield
        except NonFiniteError as error:
            said = f"{self._where}: {self._explained(str(error), batches)}"
            if self._train.on_non_finite == "error":
                raise NonFiniteError(said) from error
            self.struck = True
            self._note(f"warning: {said}; this optimizer step is skipped")

    def _explained(self, text: str, batches: Sequence[PackedBatch]) -> str:
        """Which prompt, and which weights, layer or gradients: the first of them that are not finite."""
        ids = {place: name for part in gather_objects(dict(self._prompts), self._world) for place, name in part.items()}
        named = _PROMPT.sub(lambda found: f"{found[0]} ({ids.get(int(found[1]), 'unknown')})", text)
        cause = bad_weights(self._model) or bad_layer(self._model, batches)
        if not cause and self._model.optimizer is not None:
            cause = bad_gradients(self._model)
        return f"{named}; {cause}" if cause else named

    @property
    def _world(self) -> torch.distributed.ProcessGroup:
        return self._model.groups.world

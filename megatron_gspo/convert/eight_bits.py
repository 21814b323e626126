"""In which form tensors are written: as a checkpoint has them, or as an engine in eight bits takes them."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch

from megatron_gspo.convert.sources import MegatronSource
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf import fp8
from megatron_gspo.hf.fp8_model import in_eight_bits, misfits, quantization_config
from megatron_gspo.hf.stream import TensorInfo
from megatron_gspo.sync import gap


class AsStored:
    """What a checkpoint holds, bit for bit."""

    quantization: dict[str, Any] | None = None
    """Of ``config.json``."""

    def __init__(self, source: MegatronSource) -> None:
        self.source = source

    def infos(self, info: TensorInfo) -> list[TensorInfo]:
        """The tensors that are written for one of the source."""
        return [info]

    def read(self, name: str) -> torch.Tensor:
        """One of them; they are read in the order of ``infos``."""
        return self.source.read(name)


class EightBits(AsStored):
    """Matrices with a scale for each block, all else in bfloat16; by the functions of a weight sync.

    Layers that are only carried follow: matrices of the same names, and float32 stays. Raises ConfigError for a model
    that no engine takes so.
    """

    def __init__(self, source: MegatronSource) -> None:
        super().__init__(source)
        family, model = source.model.family, source.model.shape
        if wrong := misfits(family, model, attention=1, dense=1, experts=1):
            raise ConfigError(
                f"{source.directory}: eight bits have scales for blocks of {fp8.BLOCK} x {fp8.BLOCK}, and engines take "
                f"whole ones: {', '.join(wrong)}"
            )
        wide = {name for name in source.carried if source.info(name).dtype == torch.float32}
        self._chosen, self._kept = in_eight_bits(family, model), family.bias_names(model) | wide
        self._scales: dict[str, torch.Tensor] = {}
        self.quantization = quantization_config(family, model)

    def infos(self, info: TensorInfo) -> list[TensorInfo]:
        """See ``AsStored.infos``."""
        name, shape = info.name, info.shape
        if not self._chosen(name):
            return [info if name in self._kept else TensorInfo(name, fp8.READ, shape)]
        blocks = tuple(ceil(size / fp8.BLOCK) for size in shape)
        return [
            TensorInfo(name, torch.float8_e4m3fn, shape),
            TensorInfo(name + fp8.SCALE, torch.float32, blocks),
        ]

    def read(self, name: str) -> torch.Tensor:
        """See ``AsStored.read``."""
        if name in self._scales:
            return self._scales.pop(name)
        made = dict(gap.in_eight_bits(iter([(name, self.source.read(name))]), self._chosen, self._kept))
        first = made.pop(name)
        self._scales = made
        return first

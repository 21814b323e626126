"""The whole configuration: one validated tree, read from TOML, that imports no torch.

``load(path, overrides)`` reads a file and applies ``section.key=value`` overrides. Each field's docstring says what it
means and in which unit. An unknown key, a value out of range or two settings that contradict each other raise
``ConfigError`` (``LayoutError`` for layouts) with one line that shows the values.
"""

from megatron_gspo.config.layout import ParallelConfig
from megatron_gspo.config.lora import LoraConfig
from megatron_gspo.config.placement import Placement, PlacementConfig
from megatron_gspo.config.reward_server import RewardServerConfig
from megatron_gspo.config.rollouts import EvalConfig, ReplayConfig, RewardConfig, RolloutConfig, SyncConfig
from megatron_gspo.config.run import RunConfig
from megatron_gspo.config.sandbox import SandboxConfig
from megatron_gspo.config.text import dump, load, parse, read
from megatron_gspo.config.training import CriticConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from megatron_gspo.section import Section

__all__ = [
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Placement",
    "PlacementConfig",
    "ReplayConfig",
    "RewardConfig",
    "RewardServerConfig",
    "RolloutConfig",
    "RunConfig",
    "SandboxConfig",
    "Section",
    "SyncConfig",
    "TrainConfig",
    "dump",
    "load",
    "parse",
    "read",
]

"""All checks, in the order in which they are said. The first error is the first thing to mend."""

from __future__ import annotations

from megatron_gspo.doctor.check import Entry
from megatron_gspo.doctor.data import check_eval_prompts, check_prompts, check_reward
from megatron_gspo.doctor.disk import check_disk, check_run_directory
from megatron_gspo.doctor.environment import check_devices, check_engine_version, check_versions
from megatron_gspo.doctor.kernels import check_kernels, check_server_kernels
from megatron_gspo.doctor.memory import check_memory
from megatron_gspo.doctor.model import check_configuration, check_layout, check_model, check_tokenizer, check_weights
from megatron_gspo.doctor.pair import check_pair
from megatron_gspo.doctor.placement import check_where
from megatron_gspo.doctor.reward_server import check_reward_server
from megatron_gspo.doctor.servers import check_servers
from megatron_gspo.doctor.settings import check_settings
from megatron_gspo.doctor.suites import check_suites

CHECKS = (
    Entry("configuration", check_configuration, needs=()),
    Entry("versions", check_versions, needs=()),
    Entry("kernels", check_kernels, needs=()),
    Entry("engine", check_engine_version, setting="rollout.server_python"),
    Entry("trainer, servers", check_pair, needs=("config", "engine")),
    Entry("server kernels", check_server_kernels, needs=("config", "engine")),
    Entry("devices", check_devices),
    Entry("model", check_model, setting="model.path", file="model.path"),
    Entry("weights", check_weights, needs=("config", "model"), setting="model.path"),
    Entry("tokenizer", check_tokenizer, needs=("config", "model"), setting="model.path"),
    Entry("layout", check_layout, needs=("config", "model"), setting="[parallel]"),
    Entry("placement", check_where, needs=("config", "model"), setting="[placement]"),
    Entry("memory", check_memory, needs=("config", "model", "layout", "placement"), setting="[placement]"),
    Entry("prompts", check_prompts, needs=("config", "tokenizer"), setting="data.path", file="data.path"),
    Entry("eval prompts", check_eval_prompts, ("config", "tokenizer"), setting="data.eval_path", file="data.eval_path"),
    Entry("suites", check_suites, needs=("config", "model", "tokenizer"), setting="eval.suites_data"),
    Entry("reward", check_reward, needs=("config", "tokenizer", "prompts"), setting="reward.function"),
    Entry("reward server", check_reward_server, needs=("config", "placement"), setting="[reward_server]"),
    Entry("settings", check_settings),
    Entry("servers", check_servers, needs=("config", "model"), setting="rollout.servers"),
    Entry("run directory", check_run_directory, setting="train.run_dir"),
    Entry("disk", check_disk, needs=("config", "model")),
)

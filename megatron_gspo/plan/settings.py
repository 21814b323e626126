"""A candidate as a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tomli_w

from megatron_gspo.config import ParallelConfig, RunConfig, parse
from megatron_gspo.plan.models import Model
from megatron_gspo.plan.serving import Servers
from megatron_gspo.plan.workload import Workload


@dataclass(frozen=True)
class Choice:
    """What a plan chooses."""

    parallel: ParallelConfig
    gpus: int
    """Of the trainer: its ranks."""
    servers: Servers
    colocated: bool
    """Servers and trainer take turns on the same GPUs."""
    microbatch_tokens: int
    recompute: str = "off"
    offload: bool = False
    state_dtype: str = "float32"
    lora: int = 0
    """Rank of adapters; 0: all weights are trained."""
    share: float = 0.0
    """Of a card, for an awake server's weights and cache; 0: not settled yet."""

    @property
    def name(self) -> str:
        """``TP2 PP4 EP8 DP2, colocated``."""
        parallel = self.parallel
        sizes = {
            "TP": parallel.tensor,
            "PP": parallel.pipeline,
            "VPP": parallel.virtual_pipeline,
            "CP": parallel.context,
            "EP": parallel.expert,
            "ETP": parallel.expert_tensor,
        }
        parts = [f"{short}{size}" for short, size in sizes.items() if size > 1]
        return " ".join([*parts, f"DP{parallel.data_size(self.gpus)}"])


@dataclass(frozen=True)
class Request:
    """What is asked for, beside the model and the GPU."""

    gpus: int
    per_node: int
    work: Workload
    placement: str = "auto"
    lora: int = 0
    narrow: bool = False
    """Moments in bfloat16 may be proposed (``optimizer.state_dtype``)."""
    engine_dtype: str = ""
    """Of servers: "fp8", or what is counted as bfloat16."""


def tree_of(model: Model, request: Request, choice: Choice) -> dict[str, Any]:
    """Plain values of a complete configuration."""
    work, parallel = request.work, choice.parallel
    sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    model_tree: dict[str, Any] = {"path": model.path, "dtype": "bfloat16"}
    if choice.recompute != "off":
        model_tree["recompute"] = choice.recompute
    tree = {
        "model": model_tree,
        "data": {"path": "data/train.jsonl"},
        "train": {
            "run_dir": "runs/plan",
            "prompts_per_step": work.prompts,
            "minibatches": work.minibatches,
            "microbatch_tokens": choice.microbatch_tokens,
        },
        "parallel": {name: getattr(parallel, name) for name in sizes if getattr(parallel, name) > 1}
        | {"data": parallel.data_size(choice.gpus)}
        | ({"stage_layers": list(parallel.stage_layers)} if parallel.stage_layers else {}),
        "optimizer": {"offload": choice.offload, "state_dtype": choice.state_dtype},
        "rollout": {
            "group_size": work.group_size,
            "max_prompt_tokens": work.prompt_tokens,
            "max_response_tokens": work.response_tokens,
            **({"engine_dtype": choice.servers.dtype} if choice.servers.dtype else {}),
            **_servers(request, choice),
        },
    }
    if work.reference:
        tree["algorithm"] = {"kl_loss_coef": 0.001}
    return tree | _sections(choice)


def config_of(model: Model, request: Request, choice: Choice) -> RunConfig:
    """The validated configuration. Raises ConfigError (LayoutError) for what cannot be."""
    return parse(tree_of(model, request, choice), source=f"a plan of {choice.name}")


def written(model: Model, request: Request, choice: Choice) -> str:
    """The configuration as TOML: what was chosen, without defaults."""
    config_of(model, request, choice)
    text = tomli_w.dumps(tree_of(model, request, choice))
    head = f"# {choice.name} on {choice.gpus} GPUs. Put your own paths in place of data.path, model.path and servers."
    return f"{head}\n{text}"


def _servers(request: Request, choice: Choice) -> dict[str, Any]:
    """Servers that one machine starts, or names of those that run on others."""
    count, together = choice.servers.count, choice.gpus + (0 if choice.colocated else choice.servers.gpus)
    if together > request.per_node:
        return {"servers": [f"http://server-{number}:30000" for number in range(count)]}
    return {"local_servers": count}


def _sections(choice: Choice) -> dict[str, Any]:
    placement: dict[str, Any] = {"mode": "colocated" if choice.colocated else "apart", "tensor": choice.servers.tensor}
    if choice.share:
        placement["memory"] = round(choice.share, 2)
    sections: dict[str, Any] = {"placement": placement}
    if choice.lora:
        sections["lora"] = {"rank": choice.lora}
    return sections

"""Whether a layout divides what it shards, and how layers fall on pipeline stages; from ``config.json`` alone."""

from __future__ import annotations

from megatron_gspo.config import ModelConfig, ParallelConfig, ReplayConfig, RolloutConfig
from megatron_gspo.errors import ConfigError, LayoutError
from megatron_gspo.hf.family import ModelShape


def check_layout(parallel: ParallelConfig, model: ModelShape) -> None:
    """Raises LayoutError, showing the division or the sum that fails."""
    rows = [
        (model.num_attention_heads, "attention heads", parallel.tensor, "tensor"),
        (model.num_query_groups, "key-value heads", parallel.tensor, "tensor"),
    ]
    if not all(model.moe_layers):
        rows.append((model.ffn_hidden_size, "rows of an MLP", parallel.tensor, "tensor"))
    if model.num_experts:
        rows.append((model.num_experts, "experts", parallel.expert, "expert"))
        rows.append((model.expert_hidden_size, "rows of an expert", parallel.expert_tensor, "expert_tensor"))
        rows.append((model.shared_expert_hidden_size, "rows of the shared expert", parallel.tensor, "tensor"))
    for count, noun, ranks, name in rows:
        if count % ranks:
            raise LayoutError(f"{count} {noun} / parallel.{name} {ranks} = {count / ranks:g}: it must divide")
    for name in ("expert", "expert_tensor"):
        if getattr(parallel, name) > 1 and not model.num_experts:
            raise LayoutError(f"parallel.{name} = {getattr(parallel, name)}, but {model.architecture} has no experts")
    stage_layers(parallel, model.num_layers)


def check_recompute(settings: ModelConfig, parallel: ParallelConfig, model: ModelShape) -> None:
    """Raises ConfigError when ``model.recompute_modules`` names nothing that the model has, or ``recompute_layers`` do
    not go into its stages."""
    if settings.recompute == "full":
        _check_recomputed_layers(settings, stage_layers(parallel, model.num_layers))
    there = {"core_attn"} | {"moe" if is_moe else "mlp" for is_moe in model.moe_layers}
    if settings.recompute == "selective" and not there & set(settings.recompute_modules):
        raise ConfigError(
            f"model.recompute_modules = {list(settings.recompute_modules)} would recompute nothing: "
            f"{model.architecture} with these layers has {', '.join(sorted(there))}"
        )


def _check_recomputed_layers(settings: ModelConfig, stages: tuple[int, ...]) -> None:
    most = settings.recompute_layers
    if settings.recompute_method == "block" and most > max(stages):
        raise ConfigError(
            f"model.recompute_layers = {most}, but the virtual pipeline stages have {list(stages)} layers: use at most "
            f'{max(stages)}, or model.recompute_method = "uniform" with 1, which runs all of them again'
        )
    if settings.recompute_method == "uniform" and any(layers % most for layers in stages):
        raise ConfigError(
            f"model.recompute_layers = {most} does not divide the layers of the virtual pipeline stages, "
            f'{list(stages)}, which model.recompute_method = "uniform" cuts: use a number that does, as 1'
        )


def check_replay(settings: ReplayConfig, model: ModelShape) -> None:
    """Raises ConfigError when routes are to be replayed in a model that has none."""
    if not any(model.moe_layers) and (settings.mode != "off" or settings.engine_routes_every):
        name = "mode" if settings.mode != "off" else "engine_routes_every"
        raise ConfigError(
            f"replay.{name} = {getattr(settings, name)!r}, but {model.architecture} with these layers is dense, and "
            f"has no routes: remove it"
        )


def check_positions(rollout: RolloutConfig, model: ModelShape) -> None:
    """Raises ConfigError when a prompt and its response may be longer than the model was made for."""
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if longest > model.max_positions:
        too_much = [
            f"rollout.{name}"
            for name in ("max_prompt_tokens", "max_response_tokens")
            if getattr(rollout, name) >= model.max_positions
        ]
        raise ConfigError(
            f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + max_response_tokens "
            f"{rollout.max_response_tokens} = {longest}, above max_position_embeddings = {model.max_positions} in "
            f"config.json: lower {' and '.join(too_much) or 'one of them'}"
        )


def stage_layers(parallel: ParallelConfig, layers: int) -> tuple[int, ...]:
    """Layers of each virtual stage, in the model's order; stage s is on pipeline rank s % ``parallel.pipeline``.

    ``parallel.stage_layers`` where it is set. Else every stage has layers // stages, and the first layers % stages one
    more: the last also has the output layer, and ranks differ by one layer at most.

    Raises LayoutError when the layers are fewer than the stages, or are not what ``stage_layers`` adds up to.
    """
    stages = parallel.pipeline * parallel.virtual_pipeline
    if parallel.stage_layers is not None:
        if sum(parallel.stage_layers) != layers:
            terms = " + ".join(map(str, parallel.stage_layers))
            raise LayoutError(
                f"parallel.stage_layers: {terms} = {sum(parallel.stage_layers)}, but the model has {layers} layers"
            )
        return parallel.stage_layers
    if layers < stages:
        raise LayoutError(
            f"{layers} layers over pipeline {parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline} = "
            f"{stages} stages leave some without a layer: use fewer, or say so with parallel.stage_layers"
        )
    share, more = divmod(layers, stages)
    return tuple(share + (stage < more) for stage in range(stages))

"""A run from its configuration to its report: what every rank executes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.parallel.exchange import agree, broadcast_object, together
from megatron_gspo.policy.checkpoint import save_checkpoint
from megatron_gspo.policy.groups import Groups, make_groups, start_distributed
from megatron_gspo.policy.policy import Policy
from megatron_gspo.rollout.engine import local_servers
from megatron_gspo.train.context import Run, build_run, load_inputs
from megatron_gspo.train.evaluate import evaluate
from megatron_gspo.train.recorder import MakeRecorder, Recorder, open_recorder
from megatron_gspo.train.save import save_hugging_face
from megatron_gspo.train.sft import Examples, fine_tune, load_examples
from megatron_gspo.train.step import outer_step


def train(config: RunConfig, make_recorder: MakeRecorder) -> None:
    """Trains as the configuration says; every rank of the world calls it. Raises MegatronGspoError."""
    start_distributed()
    groups = make_groups(config.parallel)
    set_determinism(config)
    supervised = config.algorithm.name == "sft"
    inputs = together(lambda: load_examples(config) if supervised else load_inputs(config), groups.world)
    with open_recorder(make_recorder, config, groups) as recorder:
        if isinstance(inputs, Examples):
            policy, steps = Policy(config, groups), config.total_steps
            recorder.note(inputs.describe())
            for report in fine_tune(config, groups, policy, inputs):
                recorder.steps([report])
        else:
            with rollout_servers(config, groups, recorder) as urls:
                run = build_run(config, groups, inputs, urls)
                recorder.engine({"version": run.engine.version, "seeded": run.seeded})
                recorder.note(inputs.describe())
                steps = reinforce(run, recorder)
                policy = run.policy
        finish(policy, config, groups, recorder, steps)


def reinforce(run: Run, recorder: Recorder) -> int:
    """The outer loop: roll out, learn, sync, report; evaluate before the first step and then periodically.

    Returns the optimizer steps taken.
    """
    config, steps = run.config, 0
    evaluating = bool(config.eval.every and run.eval_prompts)
    try:
        run.sync.push(run.policy.weights(), 0)  # the servers' own reading of the checkpoint is not trusted
        if evaluating:
            recorder.phase("evaluating the cold start")
            recorder.initial(evaluate(run, 0))
        for number in range(config.train.outer_steps):
            recorder.phase(f"outer step {number + 1} of {config.train.outer_steps}")
            reports, records = outer_step(run, number, first_step=steps)
            steps += len(reports)
            recorder.steps(reports[:-1])
            recorder.rollouts(number, records)
            last = number + 1 == config.train.outer_steps
            if evaluating and (last or (number + 1) % config.eval.every == 0):
                reports[-1].metrics |= evaluate(run, number + 1)
            recorder.steps(reports[-1:])
    finally:
        run.sync.close()
    return steps


def finish(policy: Policy, config: RunConfig, groups: Groups, recorder: Recorder, steps: int) -> None:
    """The last checkpoint, and the policy as a Hugging Face directory."""
    directory = Path(config.train.run_dir)
    recorder.phase("saving")
    save_checkpoint(policy, directory / "checkpoints" / "last", {"step": steps})
    if config.train.save_hf:
        save_hugging_face(policy, config, groups, directory / "hf")


@contextlib.contextmanager
def rollout_servers(config: RunConfig, groups: Groups, recorder: Recorder) -> Iterator[tuple[str, ...]]:
    """The servers' URLs, on every rank: those of the configuration, or local ones that the first rank starts.

    Raises ConfigError when local servers would have to serve ranks on other machines.
    """
    if config.rollout.servers:
        yield config.rollout.servers
        return
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if local != world:
        raise ConfigError(
            f"{world} ranks, {local} of them on this machine: servers started here would not be reached by the others; "
            f"start servers and name them in rollout.servers"
        )
    with contextlib.ExitStack() as stack:
        urls, error = None, None
        if dist.get_rank() == 0:
            recorder.phase(f"starting {config.rollout.local_servers} rollout server(s)")
            servers = local_servers(config.rollout)(
                config.rollout,
                config.model.path,
                Path(config.train.run_dir) / "servers",
                device="cuda" if torch.cuda.is_available() else "cpu",
                dtype="float32" if config.model.dtype == "float64" else config.model.dtype,
                seed=config.train.seed,
            )
            try:
                urls = stack.enter_context(servers).urls
            except Exception as caught:
                error = caught
        agree(error, groups.world)
        yield broadcast_object(urls, 0, groups.world)


def set_determinism(config: RunConfig) -> None:
    """torch's deterministic algorithms: always on a CPU, on a GPU when asked for."""
    torch.manual_seed(config.train.seed)
    if config.train.deterministic or not torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

"""Metrics to Weights & Biases: the ``wandb`` extra, imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import DependencyError
from megatron_gspo.report.metrics import clean
from megatron_gspo.report.rundir import RunDirectory

if TYPE_CHECKING:
    from megatron_gspo.types import StepReport


class WandbSink:
    """One Weights & Biases run, named as the run directory; project and account come from wandb's own environment."""

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise DependencyError(
                "train.wandb = true needs wandb, which is not installed: pip install 'megatron-gspo[wandb]'"
            ) from error
        self._run = wandb.init(name=run.path.name, dir=str(run.path), config=config.model_dump(mode="json"))
        # wandb's own step may not be negative, and the initial evaluation's is: ours is a metric to plot against.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, report: StepReport) -> None:
        self._run.log({"step": report.step, "outer_step": report.outer_step, **clean(report.metrics)})

    def close(self) -> None:
        self._run.finish()

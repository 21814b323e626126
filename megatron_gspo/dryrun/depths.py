"""Which ranks a layout has, and a rank of many layers from two runs of few."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_gspo.config import ModelConfig, ParallelConfig, RunConfig
from megatron_gspo.dryrun.result import Collectives, Moment, Peak, Rank
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.layout import stage_layers


@dataclass(frozen=True)
class Kind:
    """Ranks that do the same, but for how many micro-batches are in flight: of those, the fullest."""

    stage: int
    """The first of its pipeline stages."""
    stages: int
    """How many there are."""
    of: int
    """Stages of the pipeline."""

    @property
    def name(self) -> str:
        """ "stages 1 to 6 of 8", counted from 0."""
        if self.of == 1:
            return "all ranks"
        return f"stage {self.stage} of {self.of}" + f" (and {self.stages - 1} more)" * (self.stages > 1)


def kinds_of(parallel: ParallelConfig, shape: ModelShape) -> list[Kind]:
    """A kind for the first stage, the last, and those between by their layers."""
    last = parallel.pipeline - 1
    stages: dict[object, list[int]] = {}
    for stage in range(parallel.pipeline):
        layers = tuple(tuple(chunk) for chunk in chunks_of(stage, parallel, shape))
        stages.setdefault((stage == 0, stage == last, layers), []).append(stage)
    return [Kind(same[0], len(same), parallel.pipeline) for same in stages.values()]


def chunks_of(stage: int, parallel: ParallelConfig, shape: ModelShape) -> list[tuple[bool, ...]]:
    """Of each of a stage's virtual stages, whether each layer is a mixture of experts."""
    found, first = [], 0
    for chunk, layers in enumerate(stage_layers(parallel, shape.num_layers)):
        if chunk % parallel.pipeline == stage:
            found.append(shape.moe_layers[first : first + layers])
        first += layers
    return found


def depths_for(model: ModelConfig, chunks: list[tuple[bool, ...]]) -> tuple[int, int] | None:
    """Two numbers of layers from which the rest follows, for each run of layers of one kind in a virtual stage; None
    where that would not be less work, or where which layers run again depends on their place.

    Not one layer: backward of the second finds in place what that of the first one made (``parallel.gradients``)."""
    unit = model.recompute_layers if model.recompute == "full" else 1
    if model.recompute == "full" and model.recompute_method == "block":
        return None
    whole = all(chunk and len(set(chunk)) == 1 and len(chunk) == len(chunks[0]) for chunk in chunks)
    return (2 * unit, 3 * unit) if whole and len(chunks[0]) > 5 * unit else None


def shortened(config: RunConfig, shape: ModelShape, stage: int, depth: int) -> tuple[RunConfig, ModelShape]:
    """The model with ``depth`` layers in each virtual stage, all of the kind that ``stage`` has."""
    (kind,) = set(chunks_of(stage, config.parallel, shape)[0])
    chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    parallel = config.parallel.model_copy(update={"stage_layers": (depth,) * chunks})
    short = replace(shape, num_layers=depth * chunks, moe_layers=(kind,) * (depth * chunks))
    return config.model_copy(update={"parallel": parallel}), short


GROWING = ("weights", "gradients", "optimizer", "reference", "critic", "activations", "dispatch")
"""Parts that each layer has its own of; what comes and goes is one layer's. (Rows on their way are kept for backward
where they are not made again.)"""


def composed(few: Rank, more: Rank, steps: float) -> Rank:
    """A rank ``steps`` times further from ``few`` than ``more`` is: every layer adds what the one between them does."""

    def along(one: float, other: float) -> float:
        return one + steps * (other - one)

    def peak(moment: Moment) -> Peak:
        one, other = few.peaks[moment].parts, more.peaks[moment].parts
        pairs = {name: (one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}
        parts = {name: along(*pair) if name in GROWING else max(pair) for name, pair in pairs.items()}
        return Peak(parts, moment, along(few.host, more.host))

    keys = [(each.kind, each.group) for each in more.collectives]
    before = {(each.kind, each.group): each for each in few.collectives}
    after = {(each.kind, each.group): each for each in more.collectives}
    nothing = Collectives("", "", 0.0, 0.0)
    return Rank(
        peaks={moment: peak(moment) for moment in few.peaks if moment in more.peaks},
        collectives=tuple(
            Collectives(
                *key,
                along(before.get(key, nothing).count, after[key].count),
                along(before.get(key, nothing).bytes, after[key].bytes),
            )
            for key in keys
        ),
        flops=along(few.flops, more.flops),
        host=along(few.host, more.host),
    )

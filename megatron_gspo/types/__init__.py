"""The nouns of the pipeline, in the order in which data flows through them.

    Prompt -> Rollout -> RolloutGroup -> Sample -> PackedBatch -> TokenShard -> LossOutput -> StepReport, RolloutRecord

Shape suffixes, used everywhere in this package:

    _T  tokens of a packed micro-batch that this rank holds        _S  sequences of a micro-batch
    _R  trained tokens of one response                             _N  tokens of one prompt
    _G  responses of one prompt (the group)                        _P  prompts
    _V  vocabulary      _H  hidden      _L  layers      _K  experts chosen a token

Names say who computed a thing: ``rollout_`` the inference engine, ``old_`` the trainer before the outer step's first
update (pi_old), ``new_`` the trainer now (pi_theta), ``ref_`` the reference policy.
"""

from megatron_gspo.types.access import OPEN, ServerAccess, is_of_another_run
from megatron_gspo.types.batches import PackedBatch, PlacedSample, Sample, Shard, TokenShard
from megatron_gspo.types.columns import Axis, Column, Columns, packed_columns
from megatron_gspo.types.losses import DTYPES, LossOutput, SequenceSum, Trained
from megatron_gspo.types.reports import RolloutRecord, StepReport
from megatron_gspo.types.rollouts import FinishReason, Prompt, Rollout, RolloutGroup
from megatron_gspo.types.routes import RouteShape, RouteShard

__all__ = [
    "DTYPES",
    "OPEN",
    "Axis",
    "Column",
    "Columns",
    "FinishReason",
    "LossOutput",
    "PackedBatch",
    "PlacedSample",
    "Prompt",
    "Rollout",
    "RolloutGroup",
    "RolloutRecord",
    "RouteShape",
    "RouteShard",
    "Sample",
    "SequenceSum",
    "ServerAccess",
    "Shard",
    "StepReport",
    "TokenShard",
    "Trained",
    "is_of_another_run",
    "packed_columns",
]

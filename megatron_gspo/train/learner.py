"""What computes an outer step's passes and updates: the policy, its reference, and the groups that they lie in."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.config import RunConfig
from megatron_gspo.parallel.sequence import ShardedSequenceSum
from megatron_gspo.policy.groups import Groups
from megatron_gspo.policy.policy import Policy


@dataclass(frozen=True)
class Learner:
    """One rank's share of what computes an outer step's passes and updates, once the responses are there."""

    config: RunConfig
    groups: Groups
    policy: Policy
    reference: Policy | None
    """The frozen reference; None unless the loss has a KL term."""
    sequence_sum: ShardedSequenceSum


def build_learner(config: RunConfig, groups: Groups) -> Learner:
    """Loads the policy and, for a KL term, the reference. Collective. Raises UserError for what the user can mend."""
    policy = Policy(config, groups)
    reference = None
    if config.algorithm.uses_reference:
        path = config.algorithm.reference or config.model.path
        reference = Policy(config, groups, path=path, trainable=False)
    return Learner(
        config=config,
        groups=groups,
        policy=policy,
        reference=reference,
        sequence_sum=ShardedSequenceSum(groups.token),
    )

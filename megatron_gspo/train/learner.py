"""What computes an outer step's passes and updates: the models, and the groups that they lie in."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.config import RunConfig
from megatron_gspo.megatron.critic import Critic
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.network import Network
from megatron_gspo.megatron.policy import BasePolicy, Policy
from megatron_gspo.parallel.sequence import ShardedSequenceSum


@dataclass(frozen=True)
class Learner:
    """One rank's share of what computes an outer step's passes and updates, once the responses are there."""

    config: RunConfig
    groups: Groups
    policy: Policy
    reference: Policy | BasePolicy | None
    """The frozen reference; None unless the loss or the reward has a KL term. With adapters it is the policy without
    them, unless ``algorithm.reference`` names another model."""
    sequence_sum: ShardedSequenceSum
    critic: Critic | None
    """None unless credit is given by its values."""

    @property
    def models(self) -> dict[str, Network]:
        """What is trained, by the name that it has in a checkpoint."""
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic is not None else {})


def build_learner(config: RunConfig, groups: Groups) -> Learner:
    """Loads the policy and, where the algorithm needs them, the reference and the critic. Collective.

    Raises UserError for what the user can mend.
    """
    policy = Policy(config, groups)
    reference: Policy | BasePolicy | None = None
    if config.algorithm.uses_reference:
        path = config.algorithm.reference or config.model.path
        base = config.reference_is_base
        reference = BasePolicy(policy) if base else Policy(config, groups, path=path, trainable=False)
    return Learner(
        config=config,
        groups=groups,
        policy=policy,
        reference=reference,
        sequence_sum=ShardedSequenceSum(groups.token),
        critic=Critic(config, groups) if config.algorithm.uses_critic else None,
    )

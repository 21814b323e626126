"""Every error that megatron_gspo raises on purpose.

Each class is also a standard exception, so that a caller who knows nothing of this module still catches the right
thing. A message carries the values that failed and what to do about them. ``UserError`` marks the user's mistake:
the command line prints its message as one line and exits with 2; any other failure exits with 1.
"""


class MegatronGspoError(Exception):
    """Root of the hierarchy."""


class UserError(MegatronGspoError):
    """Something that the user can mend: a setting, a file, a missing package."""


class ConfigError(UserError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class LayoutError(ConfigError):
    """A parallel layout does not multiply out, or does not divide what it shards."""


class DataError(UserError, ValueError):
    """A prompt file, a tokenizer or a reference answer cannot be used as it is."""


class WeightError(UserError, ValueError):
    """A Hugging Face directory lacks a tensor, or holds one of the wrong shape or dtype."""


class DependencyError(UserError, ImportError):
    """A package is missing or too old; the message names the extra that brings it."""


class WriteError(MegatronGspoError, OSError):
    """The disk is full, or refuses for another reason what a run writes; what was whole before still is."""


class RolloutError(MegatronGspoError, RuntimeError):
    """A rollout server failed, or its reply cannot be used."""


class EngineReplyError(RolloutError, ValueError):
    """A rollout server's reply broke the contract (counts, ids, logprobs, weight version)."""


class EngineMismatchError(RolloutError):
    """A rollout server's logprobs are not the trainer's: it computes another model, or holds other weights."""


class EngineUnavailableError(RolloutError, ConnectionError):
    """A rollout server does not answer, or died."""


class StaleWeightsError(EngineReplyError):
    """A rollout server answered with weights that this run has not sent: it was started again since the last sync."""


class NoServerError(EngineUnavailableError):
    """No rollout server is left that could be asked for responses."""


class SyncError(MegatronGspoError, RuntimeError):
    """A weight sync did not leave the servers at the version that was sent."""


class NoAnswerError(SyncError):
    """A server that is gone, or was silent for too long."""


class RewardError(MegatronGspoError, ValueError):
    """A reward function raised, timed out, or returned something outside [0, 1]."""


class NonFiniteError(MegatronGspoError, ArithmeticError):
    """A NaN or an infinity at an unmasked position; the optimizer has not moved."""


class RankMissingError(MegatronGspoError, TimeoutError):
    """A rank did not come to a collective: it is stopped, or its machine is gone."""


class ReplayError(MegatronGspoError, RuntimeError):
    """Routes were not recorded or replayed as they should have been; the optimizer has not moved."""


class BatchError(MegatronGspoError, ValueError):
    """A batch is inconsistent with itself or with the layout (lengths, masks, budgets)."""


class RunStopped(MegatronGspoError):
    """The run was asked to stop (SIGTERM or SIGUSR1) and has saved a checkpoint: it can be resumed."""

"""Log-ratios between the new and the old policy, of tokens and of whole sequences.

Everything stays in log space. A sequence's ratio s_i is within 1e-3 of 1, where fp32 numbers lie 1.2e-7 apart: forming
s_i and comparing it with 1 + 3e-4 would move the edge of the clip range by up to 2e-4 of its width, and s_i - 1 would
keep three digits. log s_i has no such grid. So clipping compares log s_i with log1p(+-clip), and whoever needs s_i - 1
takes ``expm1(log s_i)``.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from megatron_gspo.types import SequenceSum


def segment_sum(values_T: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sums tokens over each sequence, in one process: [..., T] -> [..., S]. The single-process ``SequenceSum``.

    Accumulates in float64 and returns the dtype of ``values_T``, at least float32. A sequence without tokens sums to 0;
    tokens of sequence S (padding) are dropped. Repeatable on a CPU, and on a GPU under torch's deterministic mode.

    Args:
        values_T: [..., T] floating point.
        sequence_T: [T] int64 in [0, S].
        num_sequences: S.
    """
    sums_S = values_T.new_zeros((*values_T.shape[:-1], num_sequences + 1), dtype=torch.float64)
    sums_S = sums_S.index_add(-1, sequence_T, values_T.double())[..., :num_sequences]
    return sums_S.to(torch.promote_types(values_T.dtype, torch.float32))


def expand(values_S: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """Gives each token its sequence's value: [S] -> [T]; padding tokens get 0 (False)."""
    return F.pad(values_S, (0, 1))[sequence_T]


def masked_log_ratio(new_logprobs_T: torch.Tensor, old_logprobs_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """log w_t = new - old at response tokens and 0 elsewhere; differentiable in ``new_logprobs_T``.

    The mask is applied to the inputs, not to the difference: a NaN or infinity at a masked position then enters no
    arithmetic, and its gradient is a true 0 (masking afterwards would leave NaN * 0 in backward).

    Args:
        new_logprobs_T: [T] float32 or float64.
        old_logprobs_T: [T]; a constant.
        mask_T: [T] bool.
    """
    new_T = torch.where(mask_T, new_logprobs_T, 0.0)
    old_T = torch.where(mask_T, old_logprobs_T.detach(), 0.0)
    return new_T - old_T


def sequence_log_ratio(
    log_ratio_T: torch.Tensor,
    mask_T: torch.Tensor,
    sequence_T: torch.Tensor,
    num_sequences: int,
    sequence_sum: SequenceSum,
) -> torch.Tensor:
    """log s_i = (sum_t m_t log w_t) / (sum_t m_t), arXiv 2507.18071 eq. 7: [T_local] -> [S], complete on every rank.

    Numerator and count are summed by one call of ``sequence_sum``: one collective when a sequence's tokens are spread
    over ranks. A sequence without any response token (padding, a dummy) gets 0.

    Args:
        log_ratio_T: [T_local], 0 where the mask is False, as ``masked_log_ratio`` returns it.
        mask_T, sequence_T: [T_local], as in ``TokenShard``.
        num_sequences: S.
    """
    stacked_T = torch.stack([log_ratio_T, mask_T.to(log_ratio_T.dtype)])
    sums_S, counts_S = sequence_sum(stacked_T, sequence_T, num_sequences)
    return sums_S / counts_S.clamp(min=1)

"""The C++ extension (csrc/packing.cpp); algorithm/planning.py is its only caller and checks its arguments."""

import numpy as np
import numpy.typing as npt

def plan(
    lengths: npt.NDArray[np.int64],
    token_budget: int,
    num_ranks: int,
    multiple_of: int,
    attention_cost: float,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], int, npt.NDArray[np.float64]]: ...

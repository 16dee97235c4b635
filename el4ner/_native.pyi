"""Compiled kernels of el4ner (csrc/module.cpp); call them through el4ner.kernels, which checks the arguments."""

import numpy as np
from numpy.typing import NDArray

def vote(
    logp: NDArray[np.float32],
    weights: NDArray[np.float64],
    hard: bool,
    winners: NDArray[np.int64],
    scores: NDArray[np.float32],
    margins: NDArray[np.float32],
) -> None:
    """logp (M, S, L), weights (M, L); writes winners, scores and margins (S,). All contiguous."""

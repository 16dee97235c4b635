"""Word features along the principal directions of every layer that is read.

The features of a pool are many and say much the same: 128 directions of a layer hold nearly all of its variance, and
the cost of a fit grows with the number of inputs. Nothing here sees a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import FloatArray
from el4ner.errors import ShapeError

_SAMPLE = 20_000
"""Words, evenly spaced, from which the directions are found."""


@dataclass(frozen=True)
class Projection:
    """Standardises D features and turns blocks of them to their principal directions, which keep their variances.

    mean, scale (D,) f32. bases: one (W, d) f32 with orthonormal columns for each of the first blocks of features, in
    order; features behind the last block are standardised and stay as they are.
    """

    mean: FloatArray
    scale: FloatArray
    bases: tuple[FloatArray, ...]

    @property
    def width(self) -> int:
        """Numbers a word has afterwards."""
        return len(self.mean) - sum(int(basis.shape[0] - basis.shape[1]) for basis in self.bases)

    def __call__(self, values: NDArray[np.floating]) -> FloatArray:
        """values (T, D) f16 or f32 -> (T, width) f32. Raises ShapeError if D differs."""
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise ShapeError(f"values {values.shape}; the projection was fitted on (words, {len(self.mean)})")
        standard = (values - self.mean) / self.scale
        parts, begin = [], 0
        for basis in self.bases:
            parts.append(standard[:, begin : begin + len(basis)] @ basis)
            begin += len(basis)
        return np.concatenate([*parts, standard[:, begin:]], axis=1, dtype=np.float32)

    def equals(self, other: Projection) -> bool:
        """Whether the other one turns everything alike, bit for bit."""
        own, its = self.to_arrays(), other.to_arrays()
        return own.keys() == its.keys() and all(np.array_equal(own[name], its[name]) for name in own)

    def to_arrays(self) -> dict[str, FloatArray]:
        """Named arrays for a cache."""
        bases = {f"basis {i}": basis for i, basis in enumerate(self.bases)}
        return {"mean": self.mean, "scale": self.scale, **bases}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.floating]]) -> Projection:
        """The inverse of `to_arrays`; other arrays are passed over."""
        n_bases = sum(name.startswith("basis ") for name in arrays)
        bases = (arrays[f"basis {i}"] for i in range(n_bases))
        mean, scale, *turns = (np.asarray(array, np.float32) for array in (arrays["mean"], arrays["scale"], *bases))
        return cls(mean, scale, tuple(turns))


def fit_projection(values: NDArray[np.floating], widths: Sequence[int], directions: int) -> Projection:
    """Mean, scale and principal directions (eigenvectors of the correlation matrix) of the features of some words.

    values (T, D) f16 or f32; widths: of the first blocks of features, the rest has none; directions: how many are kept
    of each block, 0 for all features as they are.
    """
    mean, scale = _moments(values)
    if not directions or not len(values):
        return Projection(mean, scale, ())
    sample = values[:: -(-len(values) // _SAMPLE)]
    bases, begin = [], 0
    for width in widths:
        block = slice(begin, begin + width)
        standard = (sample[:, block] - mean[block]) / scale[block]
        _, vectors = np.linalg.eigh((standard.T @ standard).astype(np.float64))
        bases.append(np.ascontiguousarray(vectors[:, ::-1][:, :directions], dtype=np.float32))
        begin += width
    return Projection(mean, scale, tuple(bases))


def _moments(values: NDArray[np.floating]) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of every feature, from float64 sums over runs of words."""
    total, squares = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for begin in range(0, len(values), 1024):
        block = values[begin : begin + 1024].astype(np.float64)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
    mean = total / max(len(values), 1)
    variance = np.maximum(squares / max(len(values), 1) - mean**2, 0)
    return mean.astype(np.float32), (np.sqrt(variance) + 1e-3).astype(np.float32)

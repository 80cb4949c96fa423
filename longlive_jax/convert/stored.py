"""A tensor of a file that is not read yet: what every reader gives and every writer takes."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor.

  Attributes:
    shape: in the file's order of axes.
    dtype: of numpy or of `ml_dtypes` (bfloat16, float8_e4m3fn).
    read: gives the array, row-major; it may be a read-only view of a mapped file.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Bytes of the numbers."""
    return math.prod(self.shape) * self.dtype.itemsize

  @classmethod
  def of(cls, array: np.ndarray) -> "Stored":
    """An array in memory."""
    return cls(tuple(array.shape), array.dtype, lambda: array)

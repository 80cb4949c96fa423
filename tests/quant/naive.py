"""NVFP4 in plain numpy, one block at a time, from the tables of the format: slow and obvious."""

import ml_dtypes
import numpy as np

F = np.float32
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
TARGETS = {
  "static_6": (6, 448),
  "static_4": (4, 448),
  "mse": (6, 256),
  "mae": (6, 256),
  "abs_max": (6, 256),
}


def nearest_code(v: np.float32) -> int:
  """The nearest of eight magnitudes, the even one of two; 8 is added for a sign bit."""
  distance = np.abs(GRID - min(abs(float(v)), 6.0))
  near = np.flatnonzero(distance == distance.min())
  return int(near[0] if len(near) == 1 else near[near % 2 == 0][0]) + 8 * bool(np.signbit(v))


def e4m3(x: np.float32) -> np.float32:
  return F(np.minimum(x, F(448)).astype(ml_dtypes.float8_e4m3fn))


def block_codes(x: np.ndarray, scale: np.float32, dec: np.float32) -> np.ndarray:
  """Codes of a block `[R, 16]`."""
  if scale == 0:
    return np.zeros(x.shape, int)
  inverse = F(1) / F(dec * scale)
  return np.array([[nearest_code(F(v * inverse)) for v in row] for row in x])


def decode(codes: np.ndarray) -> np.ndarray:
  return (GRID[codes & 7] * np.where(codes & 8, -1, 1)).astype(F)


def error(residual: np.ndarray, rule: str) -> np.float32:
  """Rows from left to right, then a butterfly over the rows; squares with one rounding a step."""
  if rule == "abs_max":
    return np.max(np.abs(residual))
  rows = []
  for row in residual:
    total = F(0)
    for r in row:
      total = F(np.float64(r) ** 2 + np.float64(total)) if rule == "mse" else F(total + abs(r))
    rows.append(total)
  while len(rows) > 1:
    half = len(rows) // 2
    rows = [F(rows[i] + rows[i + half]) for i in range(half)]
  return rows[0]


def block(x: np.ndarray, rule: str, amax: np.float32) -> tuple[np.ndarray, np.float32]:
  """(codes, scale) of a block `[R, 16]`."""
  m2, m4 = TARGETS[rule]
  enc = F(F(m2 * m4) / amax)
  dec = F(F(1) / enc)
  wanted = F(F(np.max(np.abs(x)) / F(m2)) * enc)
  scales = [e4m3(wanted), e4m3(F(wanted * F(1.5)))]
  codes = [block_codes(x, s, dec) for s in scales]
  if rule.startswith("static"):
    return codes[0], scales[0]
  errors = []
  for c, s in zip(codes, scales, strict=True):
    estimate = (decode(c) * s * amax).astype(F) / F(m2 * m4)
    errors.append(error((estimate - x).astype(F), rule))
  best = int(errors[1] < errors[0])
  return codes[best], scales[best]


def quantise(
  x: np.ndarray, rule: str, two_d: bool = False, amax: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.float32]:
  """(codes `[M, N']`, float32 scales `[M, N' / 16]`, amax) of a matrix, N' in whole blocks."""
  rows = 16 if two_d else 1
  height, width = x.shape
  x = np.pad(x.astype(F), ((0, -height % rows), (0, -width % 16)))
  amax = F(np.max(np.abs(x)) if amax is None else amax)
  codes = np.zeros(x.shape, np.uint8)
  scales = np.zeros((x.shape[0], x.shape[1] // 16), F)
  for i in range(0, x.shape[0], rows):
    for j in range(0, x.shape[1], 16):
      part = slice(i, i + rows), slice(j, j + 16)
      if amax > 0:
        codes[part], scales[i : i + rows, j // 16] = block(x[part], rule, amax)
  return codes[:height], scales[:height], amax

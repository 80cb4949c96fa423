"""Checks whose errors the user reads."""

import math

import pytest

from longlive_jax.checks import check_at_least


@pytest.mark.parametrize(
  ("value", "said"),
  [
    (math.inf, "--a=inf must be a finite number, at least 0.1"),
    (-math.inf, "--a=-inf must be at least 0.1"),
    (math.nan, "--a=nan must be at least 0.1"),
    (0, "--a=0 must be at least 0.1"),
  ],
)
def test_a_number_that_is_too_small_or_has_no_end(value: float, said: str):
  check_at_least("--a", 0.1, 0.1)
  with pytest.raises(ValueError, match=said):
    check_at_least("--a", value, 0.1)

"""Limits of a server: what cannot be one."""

import math

import pytest

from longlive_jax.serve.limits import LEAST, Limits


@pytest.mark.parametrize("name", [name for name, least in LEAST.items() if type(least) is float])
def test_a_limit_is_a_finite_number(name: str):
  with pytest.raises(ValueError, match=f"--{name}=inf must be a finite number"):
    Limits(**{name: math.inf})
  with pytest.raises(ValueError, match=f"--{name}=1e[+]308 must be at most 1e[+]12"):
    Limits(**{name: 1e308})

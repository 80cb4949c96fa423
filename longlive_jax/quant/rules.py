"""The five scale rules: how the scale of a block follows from its largest element.

With `C = m2 * m4` and the largest magnitude `amax` of a tensor, an element is about
`q * s * amax / C`: the static rules put the largest element of a block at m2, the adaptive ones
("four over six") also try 4, with a scale half as large again, and keep what has the smaller
error. Theirs end at 256 instead of 448 so that 1.5 times the largest scale is a number too.

Source: spec/nvfp4.md sections 0 and 2.1.
"""

import dataclasses
from types import MappingProxyType

from longlive_jax.checks import check_choice

WIDER = 1.5  # scale of the candidate 4 by that of the candidate 6


@dataclasses.dataclass(frozen=True)
class Rule:
  """One scale rule.

  Attributes:
    name: as configurations spell it.
    m2: where the largest element of a block lands.
    m4: where the largest scale of a tensor lands.
    error: what decides between the candidates: "square" or "absolute" for the sum over the block,
      "largest" for its maximum, "" = there is one candidate.
  """

  name: str
  m2: float
  m4: float
  error: str = ""

  @property
  def c(self) -> float:
    """Denominator of the value of a tensor."""
    return self.m2 * self.m4


_ALL = (
  Rule("static_6", 6.0, 448.0),
  Rule("static_4", 4.0, 448.0),
  Rule("mse", 6.0, 256.0, "square"),
  Rule("mae", 6.0, 256.0, "absolute"),
  Rule("abs_max", 6.0, 256.0, "largest"),
)
RULES = MappingProxyType({rule.name: rule for rule in _ALL})


def find_rule(name: str) -> Rule:
  """The rule of a name; ValueError names the known ones."""
  check_choice("scale rule", name, RULES)
  return RULES[name]

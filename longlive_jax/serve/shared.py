"""What all sessions and videos of a server share."""

import dataclasses
from concurrent.futures import Executor

from longlive_jax.serve.contract import Facts
from longlive_jax.serve.engine import Engine
from longlive_jax.serve.frames import Form
from longlive_jax.serve.hosted import Residents
from longlive_jax.serve.limits import Limits
from longlive_jax.serve.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Shared:
  """What all sessions and videos of a server share.

  Attributes:
    facts: sizes of the videos.
    limits: of clients.
    form: of encoded frames.
    engine: the model's thread.
    encoders: threads that encode frames.
    metrics: what is counted.
    residents: sessions on the accelerator; of the model's thread.
  """

  facts: Facts
  limits: Limits
  form: Form
  engine: Engine
  encoders: Executor
  metrics: Metrics
  residents: Residents

"""What XLA has timed before, for a first start that times little.

Choosing among the algorithms of a convolution means running each of them, and some take seconds: on
a new machine that is most of the first start. `longlive_jax/tuned` has what was found for the 5B
sampler, by device and version of XLA; any other device or version times for itself. To make such a
file after a start with an empty `io.compile_cache`:

  tar -czf h200_jaxlib_0.11.2.tar.gz -C CACHE/xla_gpu_per_fusion_autotune_cache_dir .
"""

import tarfile
import threading
from pathlib import Path

from longlive_jax.io.atomic import replacing

PLACE = "xla_gpu_per_fusion_autotune_cache_dir"  # as JAX calls it
TUNED = Path(__file__).parent.parent / "tuned"
_ONE = threading.Lock()  # files on their way have a name a process


def put_tuned(cache: str | Path) -> int:
  """Puts what has been timed into a compilation cache, beside what is there.

  Args:
    cache: folder of the cache.

  Returns:
    How many choices were put there.

  Raises:
    OSError: the folder cannot be written.
  """
  count = 0
  for pack in sorted(TUNED.glob("*.tar.gz")):
    with _ONE, tarfile.open(pack) as tar:
      for member in tar:
        path, content = Path(cache) / PLACE / member.name, tar.extractfile(member)
        if content is None or path.exists():
          continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
          part.write_bytes(content.read())
        count += 1
  return count

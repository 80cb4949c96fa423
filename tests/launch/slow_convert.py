"""`launch.convert` in groups of a few leaves, each with a pause: to be killed in the middle."""

import functools
import time
from typing import Any

from launch import convert
from longlive_jax.config.flags import run_main
from longlive_jax.convert import jobs, write


def main(argv: list[str]) -> None:
  """Command line."""
  save = write.save_group

  def slowly(*arguments: Any, **named: Any) -> None:
    save(*arguments, **named)
    time.sleep(0.1)

  write.save_group = slowly
  jobs.write_checkpoint = functools.partial(write.write_checkpoint, group_bytes=2**12)
  convert.main(argv)


if __name__ == "__main__":
  run_main(main, **convert.RUN)

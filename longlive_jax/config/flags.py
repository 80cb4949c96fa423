"""Command lines: the `--config` flag, and mains whose errors are one line.

`ml_collections.config_flags` parses the values; names and files are looked at first, because
its own complaints are tracebacks.

What a program tells goes to stdout; stderr has progress bars, warnings and the one line of an
error.
"""

import functools
import importlib.util
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from longlive_jax.checks import suggest
from longlive_jax.config.schema import Experiment
from longlive_jax.config.walk import check_setting_name

flags.disclaim_key_flags()  # --config and --debug belong to the program that asks for them

USER_ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, flags.Error)
TRACEBACK_FLAGS = ("--debug", "--v=1", "--verbosity=1")
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
ROOT = Path(__file__).parent.parent.parent
OURS = (ROOT / "longlive_jax", ROOT / "launch")


def define_config_flag() -> flags.FlagHolder[Experiment]:
  """Defines `--config=FILE.py[:VARIANT]` and its `--config.section.field=value`.

  Call it at the top of a launch script and pass the value to `load.from_flags`. A second call
  in one process gives the same flag.
  """
  if "config" in flags.FLAGS:
    return flags.FlagHolder(flags.FLAGS, flags.FLAGS["config"])
  return config_flags.DEFINE_config_file(
    "config",
    None,
    "configuration file, with a variant after a colon; --config.SECTION.FIELD=VALUE changes it",
    lock_config=False,
  )


def config_file(path: str) -> Path:
  """The configuration file at `path`, or the one of that name that is installed with us.

  Raises:
    FileNotFoundError: there is neither; suggests the nearest name.
    ValueError: it is neither Python nor JSON.
  """
  spec = importlib.util.find_spec("configs")
  folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
  for file in (Path(path), *(folder.parent / path for folder in folders)):
    if file.is_file() and file.suffix not in (".py", ".json"):
      raise ValueError(f"configuration '{path}' must be a .py or .json file")
    if file.is_file():
      return file
  known = [f"configs/{file.name}" for folder in folders for file in folder.glob("[a-z]*.py")]
  raise FileNotFoundError(f"configuration file '{path}' does not exist{suggest(path, known)}")


def check_no_variant(path: str, variant: str) -> None:
  """Raises ValueError if a variant is asked of a JSON file."""
  if variant:
    raise ValueError(f"configuration '{path}' has no variants, so no '{variant}'")


def run_main(
  main: Callable[[list[str]], object], *, default_config: str = "", arguments: int = 0
) -> None:
  """Runs the main of a launch script, as `absl.app.run` does, and ends the process.

  An error of the user (`USER_ERRORS`) is one line on stderr and exit code 2; `--debug` or `--v=1`
  shows its traceback. An interruption is exit code 130, SIGTERM 143; both run all clean-up first.

  Args:
    main: called with the name of the program, and its arguments, once flags are parsed.
    default_config: what `--config` is when it is not given; empty: it must be given.
    arguments: how many arguments that are no flags it takes at most.
  """
  if "debug" not in flags.FLAGS:
    flags.DEFINE_bool("debug", False, "show the traceback of an error")
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return one_line_errors(lambda: parse_flags(list(argv), default_config, arguments))
    except SystemExit as end:
      sys.exit(0 if end.code == 1 else end.code)  # 1 is absl's after the text of --help

  tidy_output()
  app.run(lambda argv: one_line_errors(lambda: main(argv)), flags_parser=parse)


def tidy_output() -> None:
  """Sends what our modules log at level INFO to stdout; that of other libraries is left out.

  So are the tracebacks that Orbax leaves behind when it reads damaged files, in its log, that of
  asyncio and as exceptions of its threads: what is raised tells of them in one line. They may come
  as late as the end of the process, so this is never undone.
  """
  logger, stderr = absl_logging.get_absl_logger(), absl_logging.get_absl_handler()

  def is_ours(record: logging.LogRecord) -> bool:
    path = Path(record.pathname)
    return record.levelno == logging.INFO and any(path.is_relative_to(folder) for folder in OURS)

  def is_said(record: logging.LogRecord) -> bool:
    noisy = record.name == "asyncio" or "orbax" in Path(record.pathname).parts
    return record.levelno != logging.INFO and not noisy

  told = logging.StreamHandler(sys.stdout)
  told.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  told.addFilter(is_ours)
  logger.addHandler(told)
  stderr.addFilter(is_said)
  sys.unraisablehook = functools.partial(drop_closed_loops, sys.unraisablehook)


def drop_closed_loops(hook: Callable[[Any], object], unraisable: Any) -> None:
  """Calls the hook unless a thread of Orbax came back to an event loop that is gone."""
  if "Event loop is closed" not in str(unraisable.exc_value):
    hook(unraisable)


def one_line_errors[T](run: Callable[[], T]) -> T:
  """Calls `run`; an error of the user becomes a line on stderr and exit code 2."""
  try:
    return run()
  except USER_ERRORS as error:
    if any(flag in sys.argv for flag in TRACEBACK_FLAGS):
      raise
    sys.stderr.write(f"error: {describe(error)}\n")
    sys.exit(2)
  except KeyboardInterrupt:
    sys.stderr.write("interrupted\n")
    sys.exit(130)


def describe(error: BaseException) -> str:
  """One line that tells what was wrong."""
  while "\n" in str(error).strip() and error.__context__ is not None:  # it quotes a traceback
    error = error.__context__
  if isinstance(error, OSError) and error.strerror and error.filename:
    return f"{error.filename}: {error.strerror}"
  said = " ".join(str(error).split())
  if isinstance(error, MemoryError):
    return f"out of memory on the host: {said}".removesuffix(": ")
  return said or type(error).__name__


def parse_flags(argv: list[str], default_config: str, arguments: int = 0) -> list[str]:
  """Parses all flags; returns what is left, the name of the program and its arguments.

  Raises:
    ValueError: no or an unknown configuration, setting or variant, or a stray argument.
    FileNotFoundError: there is no such configuration file.
    flags.Error: a wrong flag or value.
  """
  if "config" in flags.FLAGS:
    argv = with_config(argv, default_config)
    for argument in argv:
      if match := OVERRIDE.match(argument):
        check_setting_name(match[1])
  try:
    rest = flags.FLAGS(argv)
  except (AttributeError, SyntaxError) as error:  # of the code in a configuration file
    raise ValueError(f"the configuration cannot be loaded: {error}") from error
  if len(rest) > 1 + arguments:
    stray = rest[1 + arguments]
    raise ValueError(f"unexpected argument '{stray}'; flags are written --name=value")
  return rest


def with_config(argv: list[str], default_config: str) -> list[str]:
  """The arguments with the file of `--config` found, or with the default one put in front."""
  found, rest = [], list(argv)
  while rest:
    name, equals, value = rest.pop(0).partition("=")
    if name not in ("--config", "-config"):
      found.append(name + equals + value)
    elif equals or rest:
      found.append(located(value if equals else rest.pop(0)))
    else:
      raise ValueError("--config needs a file, such as --config=configs/tiny.py")
  if any(argument.startswith("--config=") for argument in found):
    return found
  wants_help = any(argument.startswith(("--help", "-help", "-?")) for argument in argv)
  if not default_config and not wants_help:
    raise ValueError("--config is needed, such as --config=configs/tiny.py")
  given = [located(default_config)] if default_config else []
  return [*argv[:1], *given, *argv[1:]]


def located(value: str) -> str:
  """`--config=...` with the path that exists; JSON is read by a file of its own."""
  path, colon, variant = value.partition(":")
  file = config_file(path)
  if file.suffix == ".json":
    check_no_variant(path, variant)
    return f"--config={Path(__file__).with_name('saved.py')}:{file}"
  return f"--config={file}{colon}{variant}"

"""What XLA has timed before goes into a compilation cache, and nothing that is there is lost."""

from concurrent.futures import ThreadPoolExecutor

from longlive_jax.io.tuned import PLACE, TUNED, put_tuned


def test_choices_go_beside_what_is_there(tmp_path):
  assert list(TUNED.glob("*.tar.gz"))
  count = put_tuned(tmp_path)
  files = [path for path in (tmp_path / PLACE).rglob("*") if path.is_file()]
  assert count == len(files) > 40 and {path.suffix for path in files} == {".pb"}
  for path in files:
    assert path.stem.encode() in path.read_bytes()  # the fingerprint that it is found by
  files[0].write_bytes(b"timed here")
  files[1].unlink()
  assert put_tuned(tmp_path) == 1
  assert files[0].read_bytes() == b"timed here" and files[1].is_file()


def test_threads_do_not_disturb_each_other(tmp_path):
  with ThreadPoolExecutor(4) as pool:
    counts = list(pool.map(put_tuned, [tmp_path] * 4))
  files = [path for path in (tmp_path / PLACE).rglob("*") if path.is_file()]
  assert sum(counts) == len(files) and {path.suffix for path in files} == {".pb"}

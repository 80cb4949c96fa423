"""Pictures of the page, where no browser can be driven."""

import sys

import pytest

from tests.serve import page_pictures


def test_without_playwright_one_line_says_what_helps(monkeypatch, capsys, tmp_path):
  monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
  out = tmp_path / "pictures"
  monkeypatch.setattr(sys, "argv", ["page_pictures", f"--out={out}"])
  with pytest.raises(SystemExit) as ended:
    page_pictures.main()
  said = capsys.readouterr().err
  assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
  assert "playwright is not installed" in said and "make browser" in said
  assert not out.exists()

"""Tokenizers: cleaning, bytes, tokenizer files, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers

from longlive_jax.config import Text
from longlive_jax.model.tokenizer import END_ID, PAD_ID, clean, load_tokenizer


def byte_text(length: int = 12) -> Text:
  return Text(vocabulary=258, length=length, tokenizer="bytes")


@pytest.fixture
def tokenizer_file(tmp_path):
  """A unigram tokenizer in the layout of the real one, with truncation and padding set."""
  words = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁circle", "▁", "b"]
  model = tokenizers.models.Unigram([(w, -1.0 - i) for i, w in enumerate(words)], unk_id=2)
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=5)
  path = tmp_path / "tokenizer.json"
  tokenizer.save(str(path))
  return path


@pytest.mark.parametrize(
  ("text", "cleaned"),
  [
    ("  a \t\n  b ", "a b"),
    ("caf\u00c3\u00a9", "caf\u00e9"),  # UTF-8 read as Latin-1
    ("a &amp;lt; b", "a < b"),  # escaped twice
    ("a\u00a0\u3000b", "a b"),
    ("Red CIRCLE", "Red CIRCLE"),
    ("", ""),
  ],
)
def test_clean(text, cleaned):
  assert clean(text) == cleaned


def test_bytes_are_shifted_closed_and_padded():
  ids, mask = load_tokenizer(byte_text(6))(["ab", "\u00e9"])
  assert ids.dtype == mask.dtype == np.int32
  np.testing.assert_array_equal(ids[0], [99, 100, END_ID, PAD_ID, PAD_ID, PAD_ID])
  np.testing.assert_array_equal(ids[1], [0xC3 + 2, 0xA9 + 2, END_ID, PAD_ID, PAD_ID, PAD_ID])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]])


def test_every_byte_fits_the_vocabulary():
  tokenizer = load_tokenizer(byte_text(300))
  ids, _ = tokenizer(["\U0010ffff\u07ff"])
  assert ids.max() < 258


def test_an_empty_prompt_is_one_end_token_and_no_prompt_is_no_row():
  ids, mask = load_tokenizer(byte_text())([""])
  assert ids[0, 0] == END_ID and mask.sum() == 1
  assert load_tokenizer(byte_text())([])[0].shape == (0, 12)


@pytest.mark.parametrize("prompt", ["&#32;", "&amp;#32;", "\u200b", " &#8203;\u00ad ", "\0"])
def test_a_prompt_with_nothing_to_see_is_refused(prompt):
  with pytest.raises(ValueError, match=r"^prompt='.*' must be text that is not empty$"):
    load_tokenizer(byte_text())(["a", prompt])


def test_a_prompt_that_is_not_unicode_is_refused():
  for prompt in ("\ud800", "a \ud83c\udfac"):
    with pytest.raises(ValueError, match=r"^prompt='.*\\ud8.* has characters that are no text"):
      load_tokenizer(byte_text())([prompt])


def test_a_prompt_with_marks_that_are_not_seen_is_one():
  ids, mask = load_tokenizer(byte_text())(["a\u200bb", " "])
  assert mask.sum(1).tolist() == [6, 1] and ids[1, 0] == END_ID


def test_a_prompt_of_exactly_the_length_fits():
  assert load_tokenizer(byte_text(5))(["abcd"])[1].sum() == 5


def test_a_prompt_that_is_too_long_is_refused_with_prompt_and_limit():
  with pytest.raises(ValueError, match=r"'abcdefgh' has 9 tokens .*model.text.length=5"):
    load_tokenizer(byte_text(5))(["ok", "abcdefgh"])


def test_truncation_keeps_the_end_token_when_asked_for():
  ids, mask = load_tokenizer(byte_text(4), truncate=True)(["abcdefgh"])
  np.testing.assert_array_equal(ids[0], [99, 100, 101, END_ID])
  assert mask.sum() == 4


def test_tokenizer_file_ignores_its_own_truncation_and_padding(tokenizer_file):
  cfg = Text(vocabulary=16, length=7, tokenizer=str(tokenizer_file))
  ids, mask = load_tokenizer(cfg)(["a  red circle"])
  np.testing.assert_array_equal(ids[0], [3, 4, 5, 1, 0, 0, 0])
  np.testing.assert_array_equal(mask[0], [1, 1, 1, 1, 0, 0, 0])
  with pytest.raises(ValueError, match="has 8 tokens"):
    load_tokenizer(cfg)(["a a a a a a a"])


def test_a_folder_stands_for_the_file_in_it(tokenizer_file):
  cfg = Text(vocabulary=16, length=4, tokenizer=str(tokenizer_file.parent))
  np.testing.assert_array_equal(load_tokenizer(cfg)(["red"])[0], [[4, 1, 0, 0]])


def test_a_missing_file_is_named(tmp_path):
  cfg = Text(tokenizer=str(tmp_path / "none.json"))
  with pytest.raises(FileNotFoundError, match=r"model.text.tokenizer=.*none.json"):
    load_tokenizer(cfg)


@pytest.mark.parametrize(
  ("content", "message"), [("{", "is not a JSON file"), ("[]", "holds no tokenizer")]
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, message):
  path = tmp_path / "tokenizer.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    load_tokenizer(Text(tokenizer=str(path)))


def test_a_tokenizer_without_end_token_is_refused(tokenizer_file):
  content = json.loads(tokenizer_file.read_text())
  content["model"]["vocab"][1][0] = "<s>"
  content["post_processor"] = None
  content["added_tokens"] = []
  tokenizer_file.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="has no token '</s>'"):
    load_tokenizer(Text(tokenizer=str(tokenizer_file)))


@pytest.mark.parametrize(
  ("cfg", "message"),
  [
    (Text(tokenizer=""), "model.text.tokenizer is empty"),
    (Text(tokenizer="bytes", vocabulary=257), "model.text.vocabulary=257 must be at least 258"),
  ],
)
def test_settings_that_do_not_fit_are_refused(cfg, message):
  with pytest.raises(ValueError, match=message):
    load_tokenizer(cfg)


def test_a_tokenizer_of_another_encoder_is_refused(tokenizer_file):
  with pytest.raises(ValueError, match="more than model.text.vocabulary=4"):
    load_tokenizer(Text(vocabulary=4, tokenizer=str(tokenizer_file)))

"""Prompts to token ids: the text encoder's tokenizer file, or plain bytes for the tiny preset.

A prompt is cleaned (broken unicode repaired, HTML unescaped twice, whitespace collapsed), then
tokenized, closed with an end token and padded to `text.length`. An empty prompt is one end token;
one that says something, of which cleaning leaves nothing to see, is refused.

Source: spec/models.md section 4.5.
"""

import dataclasses
import html
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import ftfy
import numpy as np
import tokenizers

from longlive_jax.config import Text

PAD_ID = 0
END_ID = 1
BYTE_OFFSET = 2  # byte b has id b + 2
PAD_TOKEN, END_TOKEN = "<pad>", "</s>"
UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")  # categories of Unicode that show nothing


class Tokenizer(Protocol):
  """Turns prompts into padded ids."""

  def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes prompts.

    Args:
      prompts: B texts.

    Returns:
      ids `[B, L]` int32 and mask `[B, L]` int32, 1 at real tokens, the end token included.

    Raises:
      ValueError: a prompt has more than L tokens and truncation is off, is not Unicode, or is not
        blank and has nothing to see once it is cleaned (`&#32;`, U+200B).
    """
    ...


Codec = Callable[[str], list[int]]  # text to ids, without end token or padding


def clean(text: str) -> str:
  """Repairs unicode, unescapes HTML twice, collapses whitespace and strips; keeps the case."""
  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return re.sub(r"\s+", " ", text).strip()


def checked(prompt: str) -> str:
  """The cleaned prompt.

  Raises:
    ValueError: it is not Unicode, or only looks as if it said something.
  """
  if any("\ud800" <= char <= "\udfff" for char in prompt):
    raise ValueError(f"prompt={_start(prompt)!r} has characters that are no text (surrogates)")
  cleaned = clean(prompt)
  if prompt.strip() and all(unicodedata.category(char) in UNSEEN for char in cleaned):
    raise ValueError(f"prompt={_start(prompt)!r} must be text that is not empty")
  return cleaned


@dataclasses.dataclass(frozen=True)
class PaddedTokenizer:
  """Cleans, encodes, closes and pads.

  Attributes:
    codec: text -> ids.
    length: L.
    end: id of the end token.
    pad: id of padding.
    truncate: cut a prompt that is too long (its end token stays) instead of refusing it.
  """

  codec: Codec
  length: int
  end: int = END_ID
  pad: int = PAD_ID
  truncate: bool = False

  def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """See `Tokenizer`."""
    ids = np.full((len(prompts), self.length), self.pad, np.int32)
    mask = np.zeros((len(prompts), self.length), np.int32)
    for row, prompt in enumerate(prompts):
      tokens = [*self.codec(checked(prompt)), self.end]
      if len(tokens) > self.length:
        if not self.truncate:
          raise ValueError(_too_long(prompt, len(tokens), self.length))
        tokens = [*tokens[: self.length - 1], self.end]
      ids[row, : len(tokens)] = tokens
      mask[row, : len(tokens)] = 1
    return ids, mask


def _start(prompt: str) -> str:
  return prompt if len(prompt) <= 60 else f"{prompt[:57]}..."


def _too_long(prompt: str, tokens: int, length: int) -> str:
  return (
    f"prompt {_start(prompt)!r} has {tokens} tokens (end token included);"
    f" model.text.length={length} is the most: shorten it by {tokens - length} tokens"
  )


def encode_bytes(text: str) -> list[int]:
  """UTF-8 bytes, moved past the ids of padding and end."""
  return [byte + BYTE_OFFSET for byte in text.encode()]


def load_tokenizer(cfg: Text, truncate: bool = False) -> Tokenizer:
  """The tokenizer that `cfg.tokenizer` names.

  Args:
    cfg: text encoder; `tokenizer` is "bytes" or the path of a `tokenizer.json`.
    truncate: cut prompts that are too long, as the original does, instead of refusing them.

  Raises:
    ValueError: the setting is empty, the file is no tokenizer or does not fit the vocabulary.
    FileNotFoundError: there is no such file.
  """
  if cfg.tokenizer == "bytes":
    if cfg.vocabulary < BYTE_OFFSET + 256:
      raise ValueError(
        f"model.text.vocabulary={cfg.vocabulary} must be at least {BYTE_OFFSET + 256} for"
        " model.text.tokenizer='bytes'"
      )
    return PaddedTokenizer(encode_bytes, cfg.length, truncate=truncate)
  if not cfg.tokenizer:
    raise ValueError(
      "model.text.tokenizer is empty; set it to the path of the encoder's tokenizer.json, or to"
      " 'bytes'"
    )
  return _from_file(Path(cfg.tokenizer), cfg, truncate)


def _from_file(path: Path, cfg: Text, truncate: bool) -> Tokenizer:
  """Loads a `tokenizer.json`."""
  if path.is_dir():
    path = path / "tokenizer.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"model.text.tokenizer='{cfg.tokenizer}': there is no file '{path}'; give the path of the"
      " encoder's tokenizer.json"
    )
  try:
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"model.text.tokenizer='{path}' is not a JSON file: {error}") from error
  if not isinstance(content, dict) or "model" not in content:
    raise ValueError(f"model.text.tokenizer='{path}' holds no tokenizer: 'model' is missing")
  tokenizer = tokenizers.Tokenizer.from_str(text)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  end, pad = tokenizer.token_to_id(END_TOKEN), tokenizer.token_to_id(PAD_TOKEN)
  if end is None or pad is None:
    missing = END_TOKEN if end is None else PAD_TOKEN
    raise ValueError(f"model.text.tokenizer='{path}' has no token '{missing}'")
  if tokenizer.get_vocab_size() > cfg.vocabulary:
    raise ValueError(
      f"model.text.tokenizer='{path}' has {tokenizer.get_vocab_size()} tokens, more than"
      f" model.text.vocabulary={cfg.vocabulary}: it belongs to another encoder"
    )

  def encode(prompt: str) -> list[int]:
    return tokenizer.encode(prompt, add_special_tokens=False).ids

  return PaddedTokenizer(encode, cfg.length, end, pad, truncate)

"""Scripts: their files, their errors, and their layout in blocks."""

import doctest
import json
from pathlib import Path

import pytest

from longlive_jax.data import captions, prompts
from longlive_jax.data.captions import distribute_blocks, parse_durations, script_from_captions
from longlive_jax.data.prompts import Script, Shot, expand, load_script

PREFIX = "The scene transitions. "


def strings(script: Script, prefix: str = PREFIX) -> list[str]:
  return [block.prompt for block in expand(script, 24, 8, prefix)]


@pytest.mark.parametrize("module", [prompts, captions])
def test_doctests(module):
  assert doctest.testmod(module).failed == 0


def test_worked_example_of_the_specification():
  script = Script((Shot("A", 3), Shot("B", 2), Shot("C", 3)))
  assert strings(script) == ["A"] * 3 + [PREFIX + "B", "B"] + [PREFIX + "C", "C", "C"]
  plan = expand(script, 24, 8, PREFIX)
  assert [block.shot for block in plan] == [0, 0, 0, 1, 1, 2, 2, 2]
  assert [i for i, block in enumerate(plan) if block.transition == "cut"] == [3, 5]


def test_keep_and_recache_go_on_with_the_shot():
  script = Script((Shot("A", 1), Shot("B", 2, transition="keep"), Shot("C", 1, None, "recache")))
  plan = expand(script, 24, 8, PREFIX)
  assert [b.prompt for b in plan] == ["A", "B", "B", "C"]
  assert [b.transition for b in plan] == ["start", "keep", None, "recache"]
  assert {b.shot for b in plan} == {0}


def test_the_first_transition_has_no_effect():
  for transition in prompts.TRANSITIONS:
    plan = expand(Script((Shot("A", 1, transition=transition),)), 24, 8, PREFIX)
    assert plan == (prompts.BlockPrompt("A", 0, "start"),)


def test_a_prompt_that_begins_with_the_prefix_is_no_cut():
  script = Script((Shot(PREFIX + "A", 2), Shot(PREFIX + "B", 1, transition="keep")))
  plan = expand(script, 24, 8, PREFIX)
  assert [b.transition for b in plan] == ["start", None, "keep"]
  assert [b.prompt for b in plan] == [PREFIX + "A"] * 2 + [PREFIX + "B"]


def test_an_empty_prefix_does_not_make_every_block_a_cut():
  plan = expand(Script((Shot("A", 2), Shot("B", 2))), 24, 8, "")
  assert [b.prompt for b in plan] == ["A", "A", "B", "B"]
  assert [b.transition for b in plan] == ["start", None, "cut", None]


@pytest.mark.parametrize(
  ("seconds", "fps", "latents", "blocks"),
  [
    (4.0, 24, 8, 3),
    (0.1, 24, 8, 1),
    (2.0, 24, 8, 2),
    (1.9, 24, 8, 1),
    (2, 16, 4, 2),
    (60, 24, 8, 45),
  ],
)
def test_seconds_become_the_nearest_number_of_blocks(seconds, fps, latents, blocks):
  assert Shot("A", seconds=seconds).count_blocks(fps, latents) == blocks


def test_a_shot_without_a_length_has_the_default():
  assert len(expand(Script.of("A"), 24, 8, PREFIX)) == prompts.DEFAULT_BLOCKS


def test_text_has_one_shot_a_line():
  script = Script.from_text("\ufeff# two shots\n\nA red circle.\r\n   \n  A blue square. \n")
  assert [shot.prompt for shot in script.shots] == ["A red circle.", "A blue square."]
  assert script.shots[1].transition == "cut"


def test_json_round_trip():
  script = Script(
    (Shot("Ein Kreis, größer", 2), Shot("B", seconds=1.5, transition="keep"), Shot("C")), 7, "a.png"
  )
  assert Script.from_json(script.to_json()) == script
  assert "größer" in script.to_json()


def test_files_by_suffix(tmp_path):
  script = Script.of("A", "B", blocks=2, seed=3)
  (tmp_path / "s.json").write_text(script.to_json())
  assert load_script(tmp_path / "s.json") == script
  (tmp_path / "s.txt").write_text("A\nB\n")
  assert load_script(tmp_path / "s.txt") == Script.of("A", "B")


def test_an_image_is_looked_for_beside_the_script(tmp_path):
  (tmp_path / "s.json").write_text('{"image": "first.png", "shots": [{"prompt": "A"}]}')
  assert load_script(tmp_path / "s.json").image == str(tmp_path / "first.png")
  (tmp_path / "s.json").write_text('{"image": "/a/first.png", "shots": [{"prompt": "A"}]}')
  assert load_script(tmp_path / "s.json").image == "/a/first.png"


def shot(**fields) -> str:
  return json.dumps({"shots": [{"prompt": "A"}, fields]})


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("", r"not JSON: Expecting value \(line 1, column 1\)"),
    ('{"shots": [\n{"prompt": "A"},\n]}', r"not JSON: .*\(line [23], column \d+\)"),
    ("[]", "the script must be a JSON object with the fields shots, seed, image"),
    ("{}", "the script is empty: it needs at least one shot"),
    ('{"shots": []}', "the script is empty"),
    ('{"shots": {"prompt": "A"}}', "shots must be a list"),
    ('{"shot": []}', r"unknown field 'shot' \(did you mean 'shots'\?\)"),
    ('{"shots": [{"prompt": "A"}], "seed": -1}', "seed=-1 must be a whole number"),
    ('{"shots": [{"prompt": "A"}], "seed": 1.5}', "seed=1.5 must be a whole number"),
    ('{"shots": [{"prompt": "A"}], "image": 3}', "image=3 must be the path"),
    ('{"shots": ["A"]}', r"shots\[0\] must be a JSON object"),
    (shot(promt="B"), r"shots\[1\] has an unknown field 'promt' \(did you mean 'prompt'\?\)"),
    (shot(blocks=2), r"shots\[1\] has no prompt"),
    (shot(prompt="  "), r"shots\[1\]: prompt='  ' must be text"),
    (shot(prompt=3), r"shots\[1\]: prompt=3 must be text"),
    (shot(prompt="B", blocks=1, seconds=2), r"shots\[1\]: blocks=1 and seconds=2 are both given"),
    (shot(prompt="B", blocks=0), "blocks=0 must be a whole number of at least 1"),
    (shot(prompt="B", blocks=1.5), "blocks=1.5 must be a whole number"),
    (shot(prompt="B", blocks=True), "blocks=True must be a whole number"),
    (shot(prompt="B", seconds=-1), "seconds=-1 must be a number of more than 0"),
    (shot(prompt="B", seconds=float("nan")), "seconds=nan must be a number"),
    (shot(prompt="B", seconds="2"), "seconds='2' must be a number"),
    (
      shot(prompt="B", transition="cutt"),
      r"must be one of cut, keep, recache \(did you mean 'cut'\?\)",
    ),
    (shot(prompt="B", transition=None), "transition=None must be one of"),
  ],
)
def test_wrong_scripts_give_one_clear_line(text, line, tmp_path):
  file = tmp_path / "s.json"
  file.write_text(text)
  with pytest.raises(ValueError, match=line) as caught:
    load_script(file)
  assert "\n" not in str(caught.value)
  assert str(caught.value).startswith(f"script file '{file}': ")


def test_wrong_files_give_one_clear_line(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"script file '.*none.json' does not exist"):
    load_script(tmp_path / "none.json")
  with pytest.raises(ValueError, match=r"must end in .json or .txt"):
    load_script(tmp_path / "script.yaml")
  (tmp_path / "empty.txt").write_text("# nothing\n\n")
  with pytest.raises(ValueError, match="the script is empty"):
    load_script(tmp_path / "empty.txt")
  (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
  with pytest.raises(ValueError, match="script file"):
    load_script(tmp_path / "binary.txt")


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ((3, 12, 4, None), (4, 4, 4)),
    ((2, 12, 4, None), (4, 8)),
    ((5, 12, 4, None), (4, 4, 4)),
    ((3, 12, None, (2, 6, 4)), (2, 6, 4)),
    ((3, 12, 4, (2, 6, 4)), (2, 6, 4)),  # durations come first
    ((2, 12, None, (2, 6, 4)), (2, 10)),  # no more than there are captions
    ((5, 12, None, (2, 3)), (2, 10)),  # the last one used takes the rest
    ((3, 5, None, (2, 6, 4)), (2, 3)),
    ((5, 12, None, None), (3, 3, 2, 2, 2)),
    ((5, 3, None, None), (1, 1, 1)),
    ((1, 7, None, None), (7,)),
  ],
)
def test_blocks_are_distributed_as_in_the_specification(arguments, expected):
  assert distribute_blocks(*arguments) == expected


@pytest.mark.parametrize(
  "arguments", [(0, 4), (2, 0), (2, 4, 0), (2, 4, None, ()), (2, 4, None, (1, 0))]
)
def test_wrong_distributions(arguments):
  with pytest.raises(ValueError, match="must all be at least 1"):
    distribute_blocks(*arguments)


def test_strings_of_the_specification():
  def compact(captions: str, **rule) -> str:
    script = script_from_captions(list(captions), 12, **rule)
    return "".join(strings(script, "p"))

  assert compact("012", per_shot=4) == "0000p1111p2222"
  assert compact("01", per_shot=4) == "0000p11111111"
  assert compact("01234", per_shot=4) == "0000p1111p2222"
  assert compact("012", durations=parse_durations("2, 6, 4")) == "00p111111p2222"


def test_wrong_durations():
  for text in ("", "2, x", "2;3", "-1"):
    with pytest.raises(ValueError, match="whole numbers"):
      parse_durations(text)


def test_the_demo_script_has_three_shots(root: Path):
  script = load_script(root / "configs" / "scripts" / "demo.json")
  plan = expand(script, 24, 8, PREFIX)
  assert plan[-1].shot >= 2
  assert len(plan) * 32 - 3 >= 250

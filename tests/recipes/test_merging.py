"""How recipe files become one document, and where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewatt.recipes import Recipe, RecipeError, dump_recipe, load_recipes


@pytest.fixture
def write(tmp_path: Path):
    """Write files of a recipe, name -> text, and return the folder."""

    def _write(**files: str) -> Path:
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return _write


def load(folder: Path, *names: str) -> Recipe:
    return load_recipes([folder / f"{name}.yaml" for name in names])


def test_mappings_merge_and_everything_else_is_replaced(write) -> None:
    folder = write(a="m: {x: 1, y: [1, 2], z: {p: 1}}", b="m: {y: [3], z: {q: 2}, w: null}")
    assert load(folder, "a", "b").settings == {"m": {"x": 1, "y": [3], "z": {"p": 1, "q": 2}, "w": None}}


def test_the_including_file_wins_over_what_it_extends_and_later_ones_over_earlier(write) -> None:
    folder = write(a="v: a\nonly_a: 1", b="v: b\nonly_b: 1", c="extends: [a.yaml, b.yaml]\nonly_c: 1", d="extends: [a.yaml, b.yaml]\nv: d")
    assert load(folder, "c").settings == {"v": "b", "only_a": 1, "only_b": 1, "only_c": 1}
    assert load(folder, "d").settings["v"] == "d"


def test_extends_is_relative_to_the_including_file(write) -> None:
    folder = write(a="extends: below/b.yaml\nx: 1")
    (folder / "below").mkdir()
    (folder / "below" / "b.yaml").write_text("extends: c.yaml\ny: 1")
    (folder / "below" / "c.yaml").write_text("z: 1")
    assert load(folder, "a").settings == {"x": 1, "y": 1, "z": 1}


def test_a_file_may_be_extended_on_two_ways(write) -> None:
    folder = write(base="x: 0", a="extends: base.yaml\na: 1", b="extends: base.yaml\nb: 1", c="extends: [a.yaml, b.yaml]")
    assert load(folder, "c").settings == {"x": 0, "a": 1, "b": 1}


def test_shipped_recipes_can_be_extended_by_name(write) -> None:
    folder = write(a="extends: network/skipnet-38")
    assert load(folder, "a").settings["model"]["init_args"]["network"]["init_args"]["depth"] == 38


def test_a_new_class_does_not_inherit_the_arguments_of_another(write) -> None:
    folder = write(
        a="n: {class_path: lib.A, init_args: {x: 1}, dict_kwargs: {k: 1}}",
        other="n: {class_path: lib.B, init_args: {y: 2}}",
        same="n: {class_path: lib.A, init_args: {y: 2}}",
        short="n: {class_path: A, init_args: {y: 2}}",
        bare="n: {init_args: {y: 2}}",
    )
    assert load(folder, "a", "other").settings["n"] == {"class_path": "lib.B", "init_args": {"y": 2}}
    for name in ("same", "short", "bare"):
        assert load(folder, "a", name).settings["n"]["init_args"] == {"x": 1, "y": 2}


def test_the_origin_of_dropped_arguments_is_forgotten(write) -> None:
    folder = write(a="n: {class_path: A, init_args: {x: 1}}", b="n: {class_path: B}")
    origin = load(folder, "a", "b").origin("n.init_args.x")
    assert origin is not None
    assert origin.path.name == "b.yaml"


def test_a_plus_appends_to_the_list_merged_so_far(write) -> None:
    folder = write(a="c: [1]", b="extends: a.yaml\nc+: [2]", d="c+: [3, {e+: [4]}]")
    assert load(folder, "b", "d").settings == {"c": [1, 2, 3, {"e": [4]}]}
    assert load(folder, "d").settings == {"c": [3, {"e": [4]}]}


def test_merging_leaves_no_file_s_values_shared(write) -> None:
    folder = write(a="c: &c [1]\nd: *c", b="c+: [2]")
    assert load(folder, "a", "b").settings == {"c": [1, 2], "d": [1]}


def test_every_key_knows_the_file_and_line_that_set_it_last(write) -> None:
    folder = write(a="m:\n  x: 1\n  y: 1\nl: [1]", b="\nm:\n  y: 2\nl+:\n  - k: 2")
    recipe = load(folder, "a", "b")
    found = {key: f"{recipe.origin(key).path.stem}:{recipe.origin(key).line}" for key in ("m.x", "m.y", "l.0", "l.1", "l.1.k", "l", "m.unset")}
    assert found == {"m.x": "a:2", "m.y": "b:3", "l.0": "a:4", "l.1": "b:5", "l.1.k": "b:5", "l": "b:4", "m.unset": "b:2"}
    assert recipe.origin("nothing") is None
    assert [path.stem for path in recipe.files] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("-2.5E+1", -25.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("010", 10),
        ("+7", 7),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("yes", "yes"),
        ("off", "off"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ("true", True),
        ("~", None),
        ("", None),
        ("bf16-mixed", "bf16-mixed"),
        ("16-mixed", "16-mixed"),
    ],
)
def test_plain_values_are_read_as_yaml_1_2_reads_them(write, text: str, value: object) -> None:
    read = load(write(a=f"x: {text}"), "a").settings["x"]
    assert read == value
    assert type(read) is type(value)


@settings(deadline=None, max_examples=50)
@given(numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
def test_every_finite_number_survives_writing_and_reading(tmp_path_factory: pytest.TempPathFactory, numbers: list[float]) -> None:
    path = tmp_path_factory.getbasetemp() / "numbers.yaml"
    path.write_text(dump_recipe({"x": numbers}))
    assert load_recipes([path]).settings == {"x": numbers}


# Eight lines, each ten times the one before.
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
LAUGHS += "\n".join(f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True))

REFUSED = {
    "duplicate key": ("m:\n  lr: 1\n  lr: 2", "{file}:3: m.lr: the key appears twice (first on line 2)"),
    "duplicate key, quoted": ("a: 1\n'a': 2", "{file}:2: a: the key appears twice"),
    "not a mapping": ("- a\n- b", "{file}:1: a recipe must be a mapping"),
    "a word": ("hello", "{file}:1: a recipe must be a mapping"),
    "empty": ("", "{file}: the file is empty"),
    "only comments": ("# nothing\n", "{file}: the file is empty"),
    "two documents": ("a: 1\n---\nb: 2", "{file}"),
    "NaN": ("m:\n  lr: .nan", "{file}:2: m.lr: numbers must be finite, got .nan"),
    "NaN as a word": ("m:\n  lr: nan", "{file}:2: m.lr: numbers must be finite"),
    "quoted NaN": ("m:\n  lr: 'NaN'", "{file}:2: m.lr: numbers must be finite"),
    "infinity": ("lr: -.inf", "{file}:1: lr: numbers must be finite, got -.inf"),
    "overflow": ("a: [1, 1e999]", "{file}:1: a.1: numbers must be finite, got 1e999"),
    "huge integer": ("a: " + "9" * 5000, "{file}:1: a: the number has 5000 digits"),
    "config key": ("config: base.yaml", "{file}:1: config: a recipe includes another with 'extends"),
    "verb key": ("fit:\n  model: {}", "{file}:1: fit: a recipe's keys stand at the top"),
    "extends a mapping": ("extends: {a: b}", "{file}:1: extends: must be a file name or a list"),
    "extends a number": ("extends: [3]", "{file}:1: extends: must be a file name or a list"),
    "extends a missing file": ("x: 1\nextends: [nowhere.yaml]", "{file}:2: extends: no recipe 'nowhere.yaml'"),
    "extends an address": ("extends: https://example.org/a.yaml", "{file}:1: extends: recipe 'https://example.org/a.yaml' is an address"),
    "recursive alias": ("a: &a\n  b: *a", "{file}:1: a.b: an alias contains itself"),
    "recursive list": ("a: &a [*a]", "{file}:1: a.0: an alias contains itself"),
    "billion laughs": (LAUGHS, "expands to more than 100,000 values"),
    "deep nesting": ("a: " + "[" * 200 + "]" * 200, "nested more than 100 deep"),
    "very deep nesting": ("a: " + "[" * 5000 + "]" * 5000, "nested more than 100 deep"),
    "undefined alias": ("a: *b", "{file}:1: not valid YAML: found undefined alias 'b'"),
    "unclosed bracket": ("a: [1, 2", "{file}:1: not valid YAML"),
    "tab": ("a:\n\tb: 1", "{file}:2: not valid YAML"),
    "control character": ("a: \x07", "{file}: not valid YAML"),
    "python tag": ("a: !!python/object/apply:os.system [echo]", "{file}:1: a: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed"),
    "python name": ("a: !!python/name:os.system ''", "is not allowed"),
    "binary tag": ("a: !!binary aGVsbG8=", "{file}:1: a: tag 'tag:yaml.org,2002:binary' is not allowed"),
    "own tag": ("a: !mine {b: 1}", "{file}:1: a: tag '!mine' is not allowed"),
    "number as a key": ("m:\n  1: a", "{file}:2: m.1: a key must be a word, got a number"),
    "null as a key": ("~: a", "a key must be a word, got null"),
    "list as a key": ("? [a, b]\n: 1", "{file}:1: a key must be a word"),
    "merge key": ("a: &a {b: 1}\nc:\n  <<: *a", "{file}:3: c: merge keys (<<) are not read"),
    "append to no list": ("c: 1\nd+: 2", "{file}:2: d+: it appends to a list, so it must be a list itself"),
    "replace and append": ("c: [1]\nc+: [2]", "{file}:1: c+: 'c+' appends"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_names_file_line_and_key(write, text: str, message: str) -> None:
    folder = write(a=text)
    with pytest.raises(RecipeError) as refused:
        load(folder, "a")
    assert message.format(file=folder / "a.yaml") in str(refused.value)
    assert str(folder / "a.yaml") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04\x95pickle", "not a text file in UTF-8 (byte 0 is 0x80)"),
        (b"PK\x03\x04\xff\xfe", "not a text file"),
        ("a: 1".encode("utf-16"), "not a text file"),
        (b"a: 1\n" + b"#" * 1_000_001, "1,000,006 bytes is no recipe"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(RecipeError, match="a.yaml") as refused:
        load(tmp_path, "a")
    assert message in str(refused.value)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: two\r\n")
    assert load(tmp_path, "a").settings == {"a": 1, "b": "two"}


def test_circles_are_named(write) -> None:
    folder = write(a="extends: b.yaml", b="extends: c.yaml", c="extends: a.yaml", own="extends: own.yaml")
    with pytest.raises(RecipeError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*a\.yaml"):
        load(folder, "a")
    with pytest.raises(RecipeError, match="circle"):
        load(folder, "own")


def test_appending_to_an_inherited_text_is_refused(write) -> None:
    folder = write(a="c: text", b="c+: [1]")
    with pytest.raises(RecipeError, match=r"b\.yaml:1: c\+: it appends to 'c', which is not a list"):
        load(folder, "a", "b")


def test_the_reader_agrees_with_pyyaml_on_plain_documents(write) -> None:
    text = "a: {b: [1, 2.5, -3], c: 'x', d: true, e: null}\nf:\n  - g: h\n    i: 1.5e-3\n"
    assert load(write(a=text), "a").settings == yaml.safe_load(text)

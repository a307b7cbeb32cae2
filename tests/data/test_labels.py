"""Names of classes: those of ImageNet are complete and in order; names and synonyms find their label."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

from lamamba.data.labels import as_names, find_label, imagenet_names, short_names, texts_for

# known from other lists of ImageNet's classes
KNOWN = {
    0: "tench", 1: "goldfish", 7: "cock", 9: "ostrich", 22: "bald eagle", 88: "macaw", 130: "flamingo",
    207: "golden retriever", 250: "Siberian husky", 279: "Arctic fox", 281: "tabby", 291: "lion", 360: "otter",
    387: "lesser panda", 388: "giant panda", 417: "balloon", 425: "barn", 538: "dome", 555: "fire engine",
    817: "sports car", 928: "ice cream", 933: "cheeseburger", 949: "strawberry", 970: "alp", 974: "geyser",
    979: "valley", 980: "volcano", 985: "daisy", 999: "toilet tissue",
}


def test_imagenet_classes_are_complete_and_in_order():
    text = (files("lamamba") / "data" / "imagenet_classes.txt").read_text(encoding="utf-8")
    synsets = [line.split()[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(synsets) == 1000
    assert synsets == sorted(set(synsets))                                      # the order of the folders' names
    assert all(len(synset) == 9 and synset[0] == "n" and synset[1:].isdigit() for synset in synsets)
    names = imagenet_names()
    first = [name.split(", ")[0] for name in names]
    assert len(set(map(str.lower, first))) == 1000
    for label, name in KNOWN.items():
        assert first[label] == name


def test_numbers_names_and_single_words_find_their_class():
    names = imagenet_names()
    for wanted, label in (
        (281, 281), ("281", 281), (np.int64(281), 281), ("tabby", 281), ("tabby cat", 281), ("Tabby, tabby cat", 281),
        ("tiger cat", 282), ("Tinca tinca", 0), ("toilet paper", 999), ("cardigan", 474), ("crane (machine)", 517),
        ("maillot", 638),
    ):
        assert find_label(wanted, names, 1000) == label, wanted
    for label, name in enumerate(names):
        assert find_label(name, names, 1000) == label
        assert find_label(name.split(", ")[0], names, 1000) == label


@pytest.mark.parametrize(("wanted", "said"), [
    ("taby", "did you mean 'tabby'"), ("golden retreiver", "did you mean 'golden retriever'"),
    ("qqqqqq", "is unknown .1000 classes, 0: 'tench"),
    (1000, "out of range; this model knows 0 .. 999"), ("-1", "out of range"),
    ("horn", "is several classes"), (1.5, "neither a class number nor a name"),
])
def test_an_unknown_name_is_answered_with_near_ones(wanted, said):
    with pytest.raises(ValueError, match=said):
        find_label(wanted, imagenet_names(), 1000)


def test_few_names_are_all_named():
    with pytest.raises(ValueError, match=r"did you mean 'cats'\? \(known: cats; dogs\)"):
        find_label("cat", ("cats", "dogs"), 2)
    with pytest.raises(ValueError, match="classes have none: use 0 .. 9"):
        find_label("three", (), 10)
    assert find_label("1", ("1", "3"), 2) == 1                                  # a number, not the name


@pytest.mark.parametrize(("wanted", "label"), [
    (1, 1), ("1", 1), (" 2 ", 2), ("caf\u00e9", 3), ("cafe\u0301", 3), ("CAFE\u0301", 3), ("Tea", 4), ("tea", 5),
    ("\u00b2", 6),
])
def test_a_whole_number_is_never_a_name_and_accents_are_one_name_however_composed(wanted, label):
    for accent in ("cafe\u0301", "caf\u00e9"):
        assert find_label(wanted, ("1", "10", "2", accent, "Tea", "tea", "\u00b2"), 7) == label


def test_a_number_that_is_only_a_name_is_refused_with_the_number_of_its_class():
    with pytest.raises(ValueError, match=r"0 \.\. 2; the class that is called 10 has the number 1"):
        find_label("10", ("1", "10", "2"), 3)


@pytest.mark.parametrize("names", [
    ("1", "10", "2"), ("tea", "tea", "coffee"), ("cafe\u0301", "caf\u00e9"), ("Tea", "tea", "\u00b2"), (),
    imagenet_names(),
])
def test_every_class_has_a_text_that_finds_it(names):
    assert [find_label(text, names, len(names)) for text in texts_for(names)] == list(range(len(names)))


def test_short_names_stay_apart():
    names = ("tabby, tabby cat", "crane, bird", "crane, machine")
    assert short_names(names) == ("tabby", "crane, bird", "crane, machine")
    assert short_names(imagenet_names())[281] == "tabby"
    assert len(set(short_names(imagenet_names()))) == 1000


def test_names_come_as_diffusers_has_them():
    assert as_names({"1": "b", "0": "a"}, 2) == as_names(["a", "b"], 2) == ("a", "b")
    assert as_names(None, 2) == as_names({}, 2) == ()
    for wrong, said in (
        ({0: "a"}, "class 1 has none"), ({0: "a", 1: "b", 2: "c"}, "too many"), (["a"], "1 names came for 2"),
        ({"x": "a", "y": "b"}, "must be class numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            as_names(wrong, 2)

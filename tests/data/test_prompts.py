"""Prompt templates: each is a sentence with one place for a name."""

import pytest

from transformers_florence.data.prompts import (
    DRAWING_TEMPLATES,
    PHOTO_TEMPLATES,
    fill_template,
    is_short,
    normalize_text,
)


@pytest.mark.parametrize(("templates", "least"), [(DRAWING_TEMPLATES, 20), (PHOTO_TEMPLATES, 80)])
def test_templates_are_distinct_sentences_with_one_place(templates, least):
    assert len(set(templates)) == len(templates) >= least
    sentences = {template.format("cat") for template in templates}  # str.format takes nothing but {}
    assert len(sentences) == len(templates)
    for template in templates:
        assert template.count("{") == template.count("}") == template.count("{}") == 1, template
        assert template == " ".join(template.split()), f"stray white space in {template!r}"
        assert fill_template(template, "cat") == template.format("cat")


def test_photo_templates_hold_what_the_papers_name():
    """The examples of Florence section 2.1, CLIP's default (its paper, section 3.1.4), UniCL's plain one."""
    assert {"a photo of the {}.", "a cropped photo of {}.", "a photo of a {}.", "{}."} <= set(PHOTO_TEMPLATES)


@pytest.mark.parametrize(
    ("text", "words", "short"),
    [("dog", 3, True), ("a  big\tdog", 3, True), ("a big dog runs", 3, False), ("a dog", 1, False), ("dog", 0, False)],
)
def test_words_and_phrases_are_short(text, words, short):
    assert is_short(text, words) == short


def test_a_name_stands_in_the_sentence_as_it_is():
    assert fill_template("a picture of {}", "a {} and {0}") == "a picture of a {} and {0}"


@pytest.mark.parametrize("template", ["", "a picture", "{} and {}", "{0}", "{name}", "{ }"])
def test_a_template_without_exactly_one_place_is_refused(template):
    with pytest.raises(ValueError, match="exactly one {}"):
        fill_template(template, "cat")


def test_descriptions_that_differ_in_case_and_spaces_alone_are_the_same():
    assert normalize_text("  A\tb\n C ") == "a b c"
    assert normalize_text("a-b, c!") == "a-b, c!"

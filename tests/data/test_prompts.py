"""Prompt templates: each is a sentence with one place for a name."""

import pytest

from transformers_florence.data.prompts import DRAWING_TEMPLATES, fill_template


def test_templates_are_distinct_sentences_with_one_place():
    assert len(set(DRAWING_TEMPLATES)) == len(DRAWING_TEMPLATES) >= 20
    sentences = {template.format("cat") for template in DRAWING_TEMPLATES}  # str.format takes nothing but {}
    assert len(sentences) == len(DRAWING_TEMPLATES)
    for template in DRAWING_TEMPLATES:
        assert template.count("{") == template.count("}") == template.count("{}") == 1, template
        assert template == " ".join(template.split()), f"stray white space in {template!r}"
        assert fill_template(template, "cat") == template.format("cat")


def test_a_name_stands_in_the_sentence_as_it_is():
    assert fill_template("a picture of {}", "a {} and {0}") == "a picture of a {} and {0}"


@pytest.mark.parametrize("template", ["", "a picture", "{} and {}", "{0}", "{name}", "{ }"])
def test_a_template_without_exactly_one_place_is_refused(template):
    with pytest.raises(ValueError, match="exactly one {}"):
        fill_template(template, "cat")

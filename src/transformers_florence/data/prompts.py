"""Prompt templates: a short description becomes a sentence (Florence section 2.1 draws one at random each time)."""

from collections.abc import Sequence

import numpy as np

# For drawings: emoji, clip art, icons. `{}` is the short description.
DRAWING_TEMPLATES: tuple[str, ...] = (
    "{}",
    "{}.",
    "a {}",
    "the {}",
    "a picture of {}",
    "a picture of a {}",
    "a photo of a {}",
    "This is a photo of {}.",
    "a drawing of {}",
    "an emoji of {}",
    "the emoji {}",
    "emoji: {}",
    "an icon of {}",
    "the icon for {}",
    "clip art of {}",
    "an illustration of {}",
    "a cartoon of {}",
    "a symbol of {}",
    "a small picture of {}",
    "a simple drawing of {}",
    "a flat icon of {}",
    "a shiny 3d icon of {}",
    "a black and white drawing of {}",
    "a colorful drawing of {}",
    "a cropped picture of {}",
    "a sticker of {}",
    "a sign of {}",
    "this is {}",
    "it shows {}",
    "here you see {}",
    "{}, a drawing",
    "{}, an emoji",
    "{} icon",
    "{} clip art",
    "{} symbol",
)

# For photographs: CLIP's eighty for ImageNet (Radford et al. 2021), which UniCL trains and evaluates with, and the
# examples of Florence section 2.1. `{}` is the short description, without an article.
PHOTO_TEMPLATES: tuple[str, ...] = (
    "{}.",
    "a photo of the {}.",
    "a cropped photo of {}.",
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)


def fill_template(template: str, name: str) -> str:
    """The sentence of a template.

    Raises:
        ValueError: the template has not exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise ValueError(f"expected a template with exactly one {{}}, got {template!r}")
    return template.replace("{}", name)


def fill_random_template(templates: Sequence[str], name: str, rng: np.random.Generator) -> str:
    """The sentence of one of the templates."""
    return fill_template(templates[int(rng.integers(len(templates)))], name)


def is_short(text: str, max_words: int = 3) -> bool:
    """Whether a text is a word or a phrase, which the paper expands by a template, and not a sentence."""
    return len(text.split()) <= max_words


def normalize_text(text: str) -> str:
    """Lower case, single spaces: two descriptions that differ in nothing else are the same description."""
    return " ".join(text.lower().split())


__all__ = [
    "DRAWING_TEMPLATES",
    "PHOTO_TEMPLATES",
    "fill_random_template",
    "fill_template",
    "is_short",
    "normalize_text",
]

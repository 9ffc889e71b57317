"""Prompt templates: a short description becomes a sentence (Florence section 2.1 draws one at random each time)."""

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


def fill_template(template: str, name: str) -> str:
    """The sentence of a template.

    Raises:
        ValueError: the template has not exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise ValueError(f"expected a template with exactly one {{}}, got {template!r}")
    return template.replace("{}", name)


__all__ = ["DRAWING_TEMPLATES", "fill_template"]

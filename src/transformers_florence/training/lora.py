"""Which layers of Florence low-rank adapters (LoRA) sit on, as `target_modules` of `peft.LoraConfig`."""

# Every linear layer inside the layers of both towers has one of these names, and nothing else has: not the projections
# into the shared space, not a classifier. All of them, because adapters on attention alone stay behind full
# fine-tuning (QLoRA, Dettmers et al. 2023, section 4).
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TOWERS = ("vision_model", "text_model")


def lora_targets(tower: str) -> str:
    """`LORA_TARGETS` of one tower alone, for a model that holds it under its name.

    Args:
        tower: `"vision_model"` or `"text_model"`.

    Returns:
        A regular expression, as `target_modules` takes it.

    Raises:
        ValueError: another name.
    """
    if tower not in TOWERS:
        raise ValueError(f"expected a tower, one of {', '.join(TOWERS)}, got {tower!r}")
    return rf"{tower}\..+\.({'|'.join(LORA_TARGETS)})"


__all__ = ["LORA_TARGETS", "lora_targets"]

"""Which layers of Florence low-rank adapters (LoRA) sit on, as `target_modules` of `peft.LoraConfig`."""

# Every linear layer inside the layers of towers, fusion, captioning decoder and Dynamic Head has one of these
# names (the last four in a RoBERTa or BERT); no projection between parts, no classifier and no predictor has. All of
# them, because adapters on attention alone stay behind full fine-tuning (QLoRA, Dettmers et al. 2023, section 4).
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "query", "key", "value", "dense"]
PARTS = ("vision_model", "text_model", "backbone", "video_model", "fusion", "decoder", "dynamic_head")


def lora_targets(part: str) -> str:
    """`LORA_TARGETS` of one part alone, for a model that holds it under its name.

    A part that is new, such as a detector's Dynamic Head, learns more if it is trained whole: take the targets of the
    tower, and name the part in `modules_to_save`.

    Args:
        part: `"vision_model"`, `"text_model"`, a detector's `"backbone"` or `"dynamic_head"`, a video classifier's
            `"video_model"`, `"fusion"`, or a captioning model's `"decoder"`.

    Returns:
        A regular expression, as `target_modules` takes it.

    Raises:
        ValueError: another name.

    Example:
        >>> LoraConfig(target_modules=lora_targets("backbone"), modules_to_save=["pyramid", "dynamic_head"])
    """
    if part not in PARTS:
        raise ValueError(f"expected a part, one of {', '.join(PARTS)}, got {part!r}")
    return rf"(.+\.)?{part}\..+\.({'|'.join(LORA_TARGETS)})"


__all__ = ["LORA_TARGETS", "lora_targets"]

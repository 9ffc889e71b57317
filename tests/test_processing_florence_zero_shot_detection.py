"""The open-set detector's processor: pictures and classes in, named boxes out."""

import pytest
import torch

from tests.test_modeling_florence_zero_shot_detection import (
    CLASSES,
    registered,  # noqa: F401
    save_open_set,
    scenes,
    tiny_processor,
)
from tests.tiny_florence import tiny_tokenizer
from transformers_florence.modeling_florence_zero_shot_detection import FlorenceForZeroShotObjectDetection


def test_it_names_what_was_found(tmp_path, registered):  # noqa: F811
    save_open_set(tmp_path, "text_head")
    model = FlorenceForZeroShotObjectDetection.from_pretrained(tmp_path)
    processor, pictures = tiny_processor(), scenes()[:2]
    inputs = processor(pictures, text=CLASSES, return_tensors="pt")
    assert inputs["input_ids"].shape[0] == 6 and set(inputs) >= {"pixel_values", "pixel_mask", "attention_mask"}
    with torch.no_grad():
        output = model(**inputs)
    sizes = [picture.size[::-1] for picture in pictures]
    found = processor.post_process_grounded_object_detection(output, 0.02, sizes, CLASSES)
    plain = processor.image_processor.post_process_object_detection(output, 0.02, sizes)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours["text_labels"] == [CLASSES[number] for number in theirs["labels"]] and len(ours["text_labels"]) > 3
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    own = [CLASSES, [*CLASSES[1:], "mountains"]]
    each = processor(pictures, text=own, return_tensors="pt")
    flat = tiny_tokenizer()([name for names in own for name in names], padding=True, return_tensors="pt")
    assert torch.equal(each["input_ids"], flat["input_ids"])
    assert processor.post_process_grounded_object_detection(output, 0.02)[0]["text_labels"] is None
    for text, message in (
        ([], "expected the names of classes, got"),
        ([["a"]], "for each of 2 pictures"),
        ([["a"], ["b", "c"]], r"got \[1, 2\] names"),
        ([["a"], [3]], "expected names of classes as texts"),
        ([[], []], "expected names of classes as texts"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(pictures, text=text)
    with pytest.raises(ValueError, match="expected the names of 3 classes, got 1"):
        processor.post_process_grounded_object_detection(output, 0.02, text_labels=["a"])

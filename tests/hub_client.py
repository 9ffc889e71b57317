"""What users do with the Hub, each in a process of its own: `python -m tests.hub_client push|load FOLDER`.

Separate processes, because `huggingface_hub` reads its endpoint, cache and offline mode once, at import.
"""

import os
import socket
import sys
from pathlib import Path

import torch
from huggingface_hub import EvalResult, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_model, save_file, save_model
from torch.testing import assert_close
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from tests.hub_server import TOKEN
from tests.tiny_florence import TEXTS, random_pixels, tiny_model, tiny_processor
from tests.tiny_heads import TABLE, Tensors, batch_for, tiny_head
from transformers_florence import (
    FlorenceBackbone,
    FlorenceForImageCaptioning,
    FlorenceForImageClassification,
    FlorenceForImageTextRetrieval,
    FlorenceForObjectDetection,
    FlorenceForPreTraining,
    FlorenceForQuestionAnswering,
    FlorenceForVideoClassification,
    FlorenceForVideoTextRetrieval,
    FlorenceForZeroShotObjectDetection,
    FlorenceFusionModel,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTextModel,
    FlorenceTokenizer,
    FlorenceVideoModel,
    FlorenceVisionModel,
    create_model_card,
    load_checkpoint,
    verify_checkpoint,
)

HEADS = {
    "vision": FlorenceVisionModel,
    "text": FlorenceTextModel,
    "classifier": FlorenceForImageClassification,
    "backbone": FlorenceBackbone,
    "detector": FlorenceForObjectDetection,
    "fusion": FlorenceFusionModel,
    "answers": FlorenceForQuestionAnswering,
    "retrieval": FlorenceForImageTextRetrieval,
    "pretraining": FlorenceForPreTraining,
    "captions": FlorenceForImageCaptioning,
    "video": FlorenceVideoModel,
    "actions": FlorenceForVideoClassification,
    "clips": FlorenceForVideoTextRetrieval,
    "open-set": FlorenceForZeroShotObjectDetection,
}
DUAL = ("in-shards", "processor-first", "from-a-folder", "uploaded")
MODEL_DOORS = {
    **dict.fromkeys([FlorenceModel, *HEADS.values()], "AutoModel"),
    FlorenceForImageClassification: "AutoModelForImageClassification",
    FlorenceBackbone: "AutoBackbone",
    FlorenceForObjectDetection: "AutoModelForObjectDetection",
    FlorenceForQuestionAnswering: "AutoModelForVisualQuestionAnswering",
    FlorenceForPreTraining: "AutoModelForPreTraining",
    FlorenceForImageCaptioning: "AutoModelForImageTextToText",
    FlorenceForVideoClassification: "AutoModelForVideoClassification",
    FlorenceForZeroShotObjectDetection: "AutoModelForZeroShotObjectDetection",
}
DOORS = {
    **{type(TABLE[head].config()): "AutoConfig" for head in MODEL_DOORS},
    **MODEL_DOORS,
    FlorenceTokenizer: "AutoTokenizer",
    FlorenceImageProcessor: "AutoImageProcessor",
    FlorenceProcessor: "AutoProcessor",
}
# `register_for_auto_class` knows one door a class; who publishes with code names the others by hand. A repository
# serves the classes of its own kind of configuration only: transformers refuses to build a classifier, whose
# configuration is an image tower's, from the code beside a dual encoder.
OTHER_DOORS = {"AutoModelForZeroShotImageClassification": "modeling_florence.FlorenceModel"}
RESULT = EvalResult(
    "zero-shot-image-classification", "me/pictures", "Pictures", "accuracy", 0.75, dataset_split="test"
)


def given(model: PreTrainedModel) -> Tensors:
    """What it reads; a dual encoder, what its processor makes."""
    if not isinstance(model, FlorenceModel):
        return batch_for(type(model))
    return {**tiny_processor()(text=TEXTS, return_tensors="pt"), "pixel_values": random_pixels(2)}


def computed(model: PreTrainedModel) -> torch.Tensor:
    """A tensor that hangs on all that a model is."""
    with torch.no_grad():
        first = model(**given(model))[0]
    return (first[-1] if isinstance(first, tuple) else first).contiguous()


def push(folder: Path) -> None:
    """Push everything, in every way, with a token that is passed along; keep what it is to be compared with."""
    torch.manual_seed(0)
    model, processor = tiny_model(), tiny_processor()
    heads = {name: tiny_head(head) for name, head in HEADS.items()}
    for name, each in {"dual": model, **heads}.items():
        save_model(each, str(folder / f"{name}.safetensors"))
        save_file(dict(given(each)), folder / f"{name}.given")
    save_file({name: computed(each) for name, each in {"dual": model, **heads}.items()}, folder / "computed")

    model.push_to_hub("me/in-shards", private=True, token=TOKEN, max_shard_size="20KB")
    processor.push_to_hub("me/in-shards", token=TOKEN)
    processor.push_to_hub("me/processor-first", token=TOKEN)
    create_model_card(model, "me/processor-first", results=[RESULT]).push_to_hub("me/processor-first", token=TOKEN)
    tiny_model(logit_scale_init_value=1.0).push_to_hub("me/processor-first", token=TOKEN)
    model.push_to_hub("me/processor-first", token=TOKEN, revision="next", tags=["tiny"])
    model.push_to_hub("me/processor-first", token=TOKEN, tags=["tiny"])
    local = str(folder / "local")
    processor.save_pretrained(local)
    for part in (model, processor):
        part.save_pretrained(local, push_to_hub=True, repo_id="me/from-a-folder", token=TOKEN)
        verify_checkpoint(local)
    HfApi(token=TOKEN).create_repo("me/uploaded")
    HfApi(token=TOKEN).upload_folder(repo_id="me/uploaded", folder_path=local)
    for name, head in heads.items():
        head.push_to_hub(f"me/{name}", token=TOKEN)

    try:
        heads["vision"].save_pretrained(folder / "refused", push_to_hub=True, repo_id="me/uploaded", token="wrong")
    except HfHubHTTPError:
        verify_checkpoint(folder / "refused")  # the folder is whole, whatever the Hub said
    else:
        raise AssertionError("the Hub takes any token")

    for ours, door in DOORS.items():
        ours.register_for_auto_class(door)
    model.config.auto_map = dict(OTHER_DOORS)
    for name, each in {"dual": model, **heads}.items():
        each.push_to_hub(f"me/{name}-with-code", token=TOKEN)
    processor.push_to_hub("me/dual-with-code", token=TOKEN)


def check(model: PreTrainedModel, kind: type, weights: Path) -> None:
    """Nothing is lost, added or rounded."""
    expected = kind(model.config)
    load_model(expected, weights)
    assert type(model) is kind
    assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def load(folder: Path) -> None:
    """Load all of it by name; in offline mode also from a folder, and without a single connection."""
    offline = os.environ["HF_HUB_OFFLINE"] == "1"
    connections: list = []
    if offline:
        socket.socket.connect = lambda self, address: connections.append(address)
        socket.getaddrinfo = lambda *arguments, **options: connections.append(arguments)
    for name in DUAL:
        check(FlorenceModel.from_pretrained(f"me/{name}"), FlorenceModel, folder / "dual.safetensors")
        snapshot = snapshot_download(f"me/{name}")
        assert verify_checkpoint(snapshot)
        check(load_checkpoint(AutoModel, snapshot), FlorenceModel, folder / "dual.safetensors")
    for name, head in HEADS.items():
        check(head.from_pretrained(f"me/{name}"), head, folder / f"{name}.safetensors")
    check(AutoModel.from_pretrained("me/vision"), FlorenceVisionModel, folder / "vision.safetensors")
    classifier = AutoModelForImageClassification.from_pretrained("me/classifier")
    check(classifier, FlorenceForImageClassification, folder / "classifier.safetensors")
    if not offline:  # where it always asks the Hub whether the repository exists, and fails
        check(AutoBackbone.from_pretrained("me/backbone"), FlorenceBackbone, folder / "backbone.safetensors")
    places = ["me/in-shards", "me/from-a-folder", *([folder / "local"] if offline else [])]
    expected = tiny_processor()
    for place in places:
        check(AutoModel.from_pretrained(place), FlorenceModel, folder / "dual.safetensors")
        processor = AutoProcessor.from_pretrained(place)
        assert type(processor) is FlorenceProcessor
        assert type(AutoImageProcessor.from_pretrained(place)) is FlorenceImageProcessor
        assert AutoTokenizer.from_pretrained(place)(TEXTS) == processor.tokenizer(TEXTS)
        inputs = {"text": TEXTS, "images": torch.ones(3, 40, 50), "return_tensors": "pt"}
        ours, theirs = processor(**inputs), expected(**inputs)
        assert sorted(ours) == sorted(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    pipe = pipeline("zero-shot-image-classification", model=str(places[-1]))
    assert type(pipe.model) is FlorenceModel
    assert connections == []


if __name__ == "__main__":
    {"push": push, "load": load}[sys.argv[1]](Path(sys.argv[2]))

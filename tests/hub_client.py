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
from safetensors.torch import load_file, save_file
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
from tests.tiny_florence import TEXTS, random_pixels, tiny_model, tiny_processor, tiny_text_config, tiny_vision_config
from transformers_florence import (
    FlorenceBackbone,
    FlorenceConfig,
    FlorenceForImageClassification,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTextConfig,
    FlorenceTextModel,
    FlorenceTokenizer,
    FlorenceVisionConfig,
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
}
DUAL = ("in-shards", "processor-first", "from-a-folder", "uploaded")
DOORS = {
    FlorenceConfig: "AutoConfig",
    FlorenceVisionConfig: "AutoConfig",
    FlorenceTextConfig: "AutoConfig",
    FlorenceModel: "AutoModel",
    FlorenceVisionModel: "AutoModel",
    FlorenceTextModel: "AutoModel",
    FlorenceForImageClassification: "AutoModelForImageClassification",
    FlorenceBackbone: "AutoBackbone",
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


def tiny_heads() -> dict[str, PreTrainedModel]:
    configs = {"text": tiny_text_config(), "backbone": tiny_vision_config(out_features=["stage1", "stage2"])}
    return {name: head(configs.get(name, tiny_vision_config())).eval() for name, head in HEADS.items()}


def computed(model: PreTrainedModel) -> torch.Tensor:
    """A tensor that hangs on all that a model is."""
    ids = {} if model.main_input_name == "pixel_values" else tiny_processor()(text=TEXTS, return_tensors="pt")
    pixels = {} if isinstance(model, FlorenceTextModel) else {"pixel_values": random_pixels(2)}
    with torch.no_grad():
        first = model(**ids, **pixels)[0]
    return (first[-1] if isinstance(first, tuple) else first).contiguous()


def push(folder: Path) -> None:
    """Push everything, in every way, with a token that is passed along; keep what it is to be compared with."""
    torch.manual_seed(0)
    model, processor, heads = tiny_model(), tiny_processor(), tiny_heads()
    for name, each in {"dual": model, **heads}.items():
        save_file(dict(each.state_dict()), folder / f"{name}.safetensors")
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
    expected, found = load_file(weights), model.state_dict()
    assert type(model) is kind and sorted(found) == sorted(expected), type(model)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


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

"""Every class in a folder: in shards, read strictly, vouched for."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import PreTrainedModel

import transformers_florence
from tests.tiny_heads import HEADS, batch_for, processor_for, result_of, tiny_head
from transformers_florence import load_checkpoint, verify_checkpoint, write_manifest

EVERY_HEAD = pytest.mark.parametrize("head", HEADS)


def test_the_table_of_tiny_heads_has_every_public_model_class():
    public = (getattr(transformers_florence, name) for name in transformers_florence.__all__)
    assert {each for each in public if isinstance(each, type) and issubclass(each, PreTrainedModel)} == set(HEADS)


@EVERY_HEAD
def test_shards_are_the_model(head, tmp_path):
    """Beside the processor, under one manifest, which finds a changed bit in whichever file it lies."""
    model = tiny_head(head)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    processor_for(head).save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and set(verify_checkpoint(tmp_path)) >= {shard.name for shard in shards}
    for loaded in (head.from_pretrained(tmp_path), load_checkpoint(head, tmp_path)):
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        with torch.no_grad():
            output, expected = result_of(loaded(**batch_for(head))), result_of(model(**batch_for(head)))
        assert_close(output, expected, rtol=1e-6, atol=1e-6)
    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards[1].write_bytes(content)
    with pytest.raises(ValueError, match=shards[1].name):
        load_checkpoint(head, tmp_path)


@EVERY_HEAD
def test_strict_loading_lists_all_that_is_wrong(head, tmp_path):
    tiny_head(head).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    own = [name for name in tensors if tensors[name].ndim == 1]
    missing, wrong, infinite = own[0], own[1], own[2]
    tensors["stranger"] = torch.zeros(2)
    tensors[wrong] = tensors[wrong].double()
    tensors[infinite] = torch.full_like(tensors[infinite], torch.inf)
    del tensors[missing]
    save_file(tensors, file, metadata={"format": "pt"})
    write_manifest(tmp_path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(head, tmp_path)
    message = str(error.value)
    for kind, name in {
        "missing": missing,
        "unexpected": "stranger",
        "of another dtype": f"{wrong} (F64)",
        "not finite": infinite,
    }.items():
        assert f"{kind}: {name}" in message

"""Pictures and texts to vectors, with any model that has the interface of transformers' CLIP."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..image_checks import picture_name, read_picture
from ..image_processing_shared import PictureDoor


def check_features(features: torch.Tensor, what: str = "features") -> None:
    """Refuse what is no matrix of finite numbers, one row a picture.

    Raises:
        ValueError: another shape, no rows, or NaN or infinity in a row; the message counts such rows.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"expected {what} of shape (pictures, dim), got {tuple(features.shape)}")
    broken = int((~torch.isfinite(features)).any(dim=1).sum())
    if broken:
        raise ValueError(f"expected finite {what}, got NaN or infinity in {broken} of {len(features)} rows")


def tokenize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Any]:
    """Texts as the model's text tower takes them, cut to its context: tensors (texts, tokens) on its device."""
    # SigLIP looks at the last position, and has always seen it after padding.
    padding = "max_length" if model.config.model_type.startswith("siglip") else True
    length = min(tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings)
    tokens = tokenizer(list(texts), return_tensors="pt", padding=padding, truncation=True, max_length=length)
    return tokens.to(model.device)


class ProcessedPictures(Dataset):
    """Pictures as pixel values (channels, height, width), one by one; None for one that cannot be read.

    Args:
        pictures: what `image_checks.read_picture` takes: paths, PIL images, arrays.
        image_processor: the model's own, ours or transformers'.
    """

    def __init__(self, pictures: Sequence[Any], image_processor: Any) -> None:
        self.pictures, self.image_processor = pictures, image_processor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> torch.Tensor | None:
        try:
            picture = self.pictures[row]  # a set of the Hub decodes here
            pixels = read_picture(
                picture,
                picture_name(picture, row),
                matte=PictureDoor.matte,
                do_convert_rgb=True,
                max_pixels=PictureDoor.max_pixels,
                max_aspect_ratio=PictureDoor.max_aspect_ratio,
                do_rescale=True,
                input_data_format=None,
            )
        except (OSError, ValueError, SyntaxError):  # what Pillow and our own door raise
            return None
        batch = self.image_processor(images=[pixels], return_tensors="pt", input_data_format="channels_first")
        return batch["pixel_values"][0]


def _keep_readable(samples: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, list[bool]]:
    read = [sample for sample in samples if sample is not None]
    return torch.stack(read) if read else None, [sample is not None for sample in samples]


@torch.no_grad()
def embed_pictures(
    model: PreTrainedModel,
    image_processor: Any,
    pictures: Sequence[Any],
    *,
    tower: bool = False,
    flip: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of pictures that are read as they are needed; those that cannot be read are left out, and told.

    Args:
        pictures: what `image_checks.read_picture` takes: paths, PIL images, arrays.
        tower: what the image tower pools, before the projection (CLIP's linear probe), as it is; else unit vectors
            of the space that both towers share. A model without a projection, such as `FlorenceVisionModel` or an
            image classifier, has the former only.
        flip: pictures mirrored left to right.
        workers: processes that read.

    Returns:
        Vectors (readable pictures, dim), float32, on the CPU; and a mask of the readable ones, (pictures,), bool.

    Raises:
        ValueError: no picture that can be read, or vectors that are not finite.
    """
    encode = getattr(model, "vision_model", model) if tower else model.get_image_features
    loader = DataLoader(
        ProcessedPictures(pictures, image_processor), batch_size, num_workers=workers, collate_fn=_keep_readable
    )
    chunks, readable = [], []
    for pixels, read in tqdm(loader, desc="pictures", disable=not progress):
        readable += read
        if pixels is None:
            continue
        pixels = pixels.to(model.device, model.dtype)
        vectors = encode(pixels.flip(-1) if flip else pixels).pooler_output.float()
        chunks.append((vectors if tower else F.normalize(vectors, dim=-1)).cpu())
    if not chunks:
        raise ValueError(f"expected at least one picture that can be read, got none among {len(readable)}")
    embeds = torch.cat(chunks)
    check_features(embeds)
    return embeds, torch.tensor(readable)


__all__ = ["ProcessedPictures", "check_features", "embed_pictures", "tokenize"]

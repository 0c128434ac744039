"""Masks of an object that is named in words: Grounding DINO finds its boxes, SAM 2 segments them.

transformers has both from its oldest supported release to the newest, their weights are Apache-2.0, and their masks have sharp
borders; CLIPSeg is a single network, but its masks are blurred (352 x 352 pixels of a squashed image), and SAM 3 has a license of
its own and requires transformers 5.
"""

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from wys_nerfstudio.utils.errors import WysError
from wys_nerfstudio.utils.hub import local_if_offline
from wys_nerfstudio.utils.log_filters import no_progress_bar_for_local_files
from wys_nerfstudio.utils.memory_errors import is_memory_error

DETECTOR_TYPES = ("grounding-dino",)
SEGMENTER_TYPES = ("sam2", "sam2_video")
"""The supported `model_type` of config.json; the public repositories of SAM 2 contain the network for videos, too."""
SHARED_EMBEDDING = "prompt_encoder.shared_embedding.positional_embedding"
"""SAM 2's second name of `shared_image_embedding.positional_embedding`, which files of transformers 4 do not have."""


@dataclass
class TextSegmenter:
    """A detector of objects that are named in words, and a segmenter of boxes."""

    detector: Any
    """transformers' GroundingDinoForObjectDetection."""
    detector_processor: Any
    """transformers' GroundingDinoProcessor."""
    segmenter: Any
    """transformers' Sam2Model."""
    segmenter_processor: Any
    """transformers' Sam2Processor."""

    def check_text(self, text: str) -> None:
        """Refuse a text that the detector would cut off.

        Raises:
            WysError: If it has more tokens than the detector takes.
        """
        limit = self.detector.config.max_text_len
        count = len(self.detector_processor.tokenizer(_as_label(text)).input_ids)
        if count > limit:
            raise WysError(f'"{text}" has {count} tokens, but the detector takes at most {limit}: shorten it.')

    @torch.no_grad()
    def segment(
        self, image: UInt8[Tensor, "h w 3"], text: str, box_threshold: float, pixel_threshold: float
    ) -> Bool[Tensor, "h w"]:
        """Return the mask of all objects that a text names; empty if there are none.

        Args:
            image: An RGB image.
            text: The object, such as "the bear"; several are separated by full stops.
            box_threshold: Boxes of a higher score are segmented, in [0, 1].
            pixel_threshold: Pixels of a higher probability are inside, in (0, 1).
        """
        mask = torch.zeros(image.shape[:2], dtype=torch.bool)
        boxes = self._boxes(image, text, box_threshold)
        if not len(boxes):
            return mask
        inputs = self.segmenter_processor(images=image.numpy(), input_boxes=[boxes.tolist()], return_tensors="pt")
        device, dtype = self.segmenter.device, self.segmenter.dtype
        outputs = self.segmenter(
            pixel_values=inputs.pixel_values.to(device, dtype),
            input_boxes=inputs.input_boxes.to(device, dtype),
            multimask_output=False,
        )
        logits = outputs.pred_masks.float()
        for box in range(len(boxes)):  # one after the other: each has the size of the image
            (inside,) = self.segmenter_processor.post_process_masks(
                logits[:, box : box + 1],
                inputs.original_sizes,
                mask_threshold=math.log(pixel_threshold / (1 - pixel_threshold)),
            )
            mask |= inside[0, 0].cpu()
        return mask

    def _boxes(self, image: UInt8[Tensor, "h w 3"], text: str, threshold: float) -> Float[Tensor, "n 4"]:
        """Return left, top, right and bottom of the boxes of what a text names, in pixels."""
        inputs = self.detector_processor(images=image.numpy(), text=_as_label(text), return_tensors="pt")
        inputs = inputs.to(self.detector.device)
        (found,) = self.detector_processor.post_process_grounded_object_detection(
            self.detector(**inputs), inputs.input_ids, threshold=threshold, target_sizes=[tuple(image.shape[:2])]
        )
        return found["boxes"]


def _as_label(text: str) -> str:
    # Grounding DINO was trained on labels that end with a full stop.
    return f"{text.strip().rstrip('.')}."


def load_text_segmenter(
    detector: str, segmenter: str, device: "str | torch.device" = "cpu", dtype: torch.dtype = torch.float32
) -> TextSegmenter:
    """Load both networks; the first call imports transformers.

    Args:
        detector: Hub id or local folder of a Grounding DINO.
        segmenter: Hub id or local folder of a SAM 2.
        device: Device of both.
        dtype: Precision of the segmenter. The detector computes in float32: transformers 4 cannot run it in half precision.

    Raises:
        WysError: If one of them cannot be loaded or is not supported.
    """
    detector_source = local_if_offline(detector, "detector", "give --detector a local folder")
    segmenter_source = local_if_offline(segmenter, "segmenter", "give --segmenter a local folder")
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor, Sam2Model, Sam2Processor

    with _loading_errors("detector", detector, detector_source):
        _check_type("detector", detector, detector_source, DETECTOR_TYPES, "IDEA-Research/grounding-dino-base")
        # In transformers 4, its attention has no other implementation.
        detecting = _load(GroundingDinoForObjectDetection, detector_source, torch.float32, "eager")
        detector_processor = GroundingDinoProcessor.from_pretrained(detector_source, trust_remote_code=False)
    with _loading_errors("segmenter", segmenter, segmenter_source):
        _check_type("segmenter", segmenter, segmenter_source, SEGMENTER_TYPES, "facebook/sam2.1-hiera-large")
        segmenting = _load(Sam2Model, segmenter_source, dtype, "sdpa", {SHARED_EMBEDDING})
        segmenting.prompt_encoder.shared_embedding = segmenting.shared_image_embedding
        segmenter_processor = Sam2Processor.from_pretrained(segmenter_source, trust_remote_code=False)
    return TextSegmenter(detecting.to(device), detector_processor, segmenting.to(device), segmenter_processor)


def _check_type(kind: str, name: str, source: str, types: tuple[str, ...], example: str) -> None:
    from transformers import PretrainedConfig

    model_type = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type not in types:
        found = f"the model_type {model_type}" if model_type else "no model_type"
        raise WysError(
            f'The {kind} "{name}" has {found} in its config.json. Supported: {", ".join(types)}, for example {example}.'
        )


def _load(
    network: Any, source: str, dtype: torch.dtype, attention: str, optional: AbstractSet[str] = frozenset()
) -> Any:
    # The config's own implementation of attention may be one that transformers downloads as code.
    loaded, info = network.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    unset = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} - optional
    if unset:
        raise ValueError(f"its weights lack {min(unset)} or have another size")
    return loaded.eval().requires_grad_(False)


@contextmanager
def _loading_errors(kind: str, name: str, source: str) -> Iterator[None]:
    """Turn errors of transformers into one sentence, and silence its notes on classes and weights."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bar_for_local_files(source):
            yield
    except WysError:
        raise
    except Exception as error:  # broken configs and weights raise errors of many kinds
        if is_memory_error(error):
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = "folder" if Path(source).is_dir() else "hub id"
        raise WysError(
            f'The {kind} "{name}" could not be loaded from its {where}: {first_line}. Give --{kind} a hub id, or a local folder '
            "in transformers format with safetensors weights."
        ) from error
    finally:
        logging.set_verbosity(verbosity)

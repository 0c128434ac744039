"""Relevance maps and local edits of images with instruction-conditioned diffusion editors.

The only package that imports diffusers; it imports no nerfstudio. Importing it is cheap: `load_editor` imports diffusers
and transformers.
"""

from wys_nerfstudio.editing.edit import (
    EditOptions,
    EditSettings,
    ImageEditOutput,
    edit_image,
    edit_images,
    relevance_maps,
)
from wys_nerfstudio.editing.editor import EMBEDDED, Editor
from wys_nerfstudio.editing.loading import load_editor

__all__ = [
    "EMBEDDED",
    "EditOptions",
    "EditSettings",
    "Editor",
    "ImageEditOutput",
    "edit_image",
    "edit_images",
    "load_editor",
    "relevance_maps",
]

"""The diffusion side: relevance maps and local edits of images with an InstructPix2Pix-type editor.

The only place that knows diffusers, and it knows nothing of nerfstudio. Importing it is cheap; diffusers and
transformers are loaded by `load_editor`.
"""

from wys_nerfstudio.editing.edit import EditSettings, edit_images, relevance_maps
from wys_nerfstudio.editing.editor import Editor
from wys_nerfstudio.editing.loading import EMBEDDED, load_editor
from wys_nerfstudio.editing.local import ImageEditOutput, LocalEditSettings, edit_image

__all__ = [
    "EMBEDDED",
    "EditSettings",
    "Editor",
    "ImageEditOutput",
    "LocalEditSettings",
    "edit_image",
    "edit_images",
    "load_editor",
    "relevance_maps",
]

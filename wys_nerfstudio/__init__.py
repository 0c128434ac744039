"""Watch Your Steps for nerfstudio: edit 3D scenes by text, only where the text is about."""

__version__ = "0.1.0"

"""How the embedded editor and the embedded CLIP were trained. Not part of the wheel."""

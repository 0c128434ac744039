"""Training of the embedded editor and the embedded CLIP model; not part of the wheel."""

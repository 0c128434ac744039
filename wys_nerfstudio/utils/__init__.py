"""Helpers for files, images, logging and encodings; independent of scenes and editors."""

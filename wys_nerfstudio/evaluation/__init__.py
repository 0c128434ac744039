"""Metrics of an edit and of its localization."""

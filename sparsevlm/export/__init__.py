"""Merge, native export, upload."""

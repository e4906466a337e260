"""Data formats, one file each: a row on disk to a conversation."""

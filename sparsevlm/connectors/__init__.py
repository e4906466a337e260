"""Connector blocks: each maps `VisualTokens` to `VisualTokens`, one file a block."""

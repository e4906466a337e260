"""The configuration, processor and model."""

"""From files on disk to packed batches."""

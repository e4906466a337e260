"""From pixels to visual tokens."""

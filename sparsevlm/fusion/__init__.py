"""How visual tokens reach the language model."""

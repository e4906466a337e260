"""SparseVLM: build, sparsify and cheaply tune vision-language models from one recipe.

Importing the package registers its configuration, processor and model with the Auto classes of transformers,
lazily: nothing heavy is imported until one of the names below is first used or transformers is already loaded.
"""

__version__ = "0.1.0.dev0"

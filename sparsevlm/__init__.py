"""SparseVLM: build, sparsify and cheaply tune vision-language models from one recipe.

After ``import sparsevlm`` the Auto classes and pipelines of transformers know its models.
"""

from sparsevlm import autoclasses

__version__ = "0.1.0.dev0"

autoclasses.install()

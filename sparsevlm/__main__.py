"""`python -m sparsevlm`: the command line."""

from sparsevlm.cli import main

if __name__ == "__main__":
    main()

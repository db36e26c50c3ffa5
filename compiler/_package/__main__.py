"""`python -m foldcut`."""

from .compiler.cli import main

main()

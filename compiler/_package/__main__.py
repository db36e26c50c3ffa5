"""`python -m foldcut`."""

from .compiler.cli.main import main

main()

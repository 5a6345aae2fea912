"""Lets `python -m summerlm` be the command."""

from summerlm.cli import main

main()

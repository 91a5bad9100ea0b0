"""`python -m undo` is the command `undo`."""

from undo.settings.command import main

main()

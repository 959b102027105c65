"""``python -m kernelnorm``: the command line."""

from kernelnorm.cli import main

main()

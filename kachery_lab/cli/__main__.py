"""`python -m kachery_lab.cli`."""

from kachery_lab.cli import main

main()

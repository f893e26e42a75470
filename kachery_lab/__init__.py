"""kachery-lab: one lab server that every kachery client can use."""

__version__ = "0.1.0"

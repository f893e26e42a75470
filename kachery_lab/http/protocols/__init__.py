"""One room per published protocol, always with the same drawers. Removing a generation is deleting a folder."""

"""The bench: Rayline and its peers, measured in one run on the same machine."""

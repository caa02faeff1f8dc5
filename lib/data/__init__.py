"""Data sets: where images come from, how they are checked, kept and read."""

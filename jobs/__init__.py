"""Rayline's verbs: what `ray job submit` runs, one file a step of the line."""

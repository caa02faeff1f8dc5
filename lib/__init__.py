"""Rayline's nouns: data, training, registry, serving and watching. The verbs are in `jobs`."""

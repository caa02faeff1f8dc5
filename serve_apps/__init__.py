"""Rayline on Ray Serve: the gateway and the model versions behind it."""

"""Serving: what the gateway and the versions are made of, without Serve itself."""

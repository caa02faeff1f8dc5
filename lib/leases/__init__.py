"""Leases: the slots of one cluster, lent to the sweeps of several owners."""

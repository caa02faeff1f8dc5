"""A version's report: one HTML file with pictures, which needs nothing else to be read."""

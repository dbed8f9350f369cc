"""The machine that runs are done on: what it is, and what was measured on it."""

"""Studies whose comparisons stop, and studies that were continued: what their analyses say, and what they refuse."""

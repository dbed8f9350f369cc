"""What runs cost: seconds and memory, as arithmetic, earlier measurements and records know it."""

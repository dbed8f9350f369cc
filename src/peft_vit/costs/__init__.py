"""What runs cost: seconds, memory and disk, as arithmetic, earlier measurements and records know it."""

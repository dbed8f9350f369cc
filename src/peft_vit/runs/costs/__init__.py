"""What runs will take, before they start: time and memory, measured or estimated, and what fits a limit of either."""

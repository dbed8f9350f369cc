"""What everything may use and what uses nothing of ours: errors, settings, files, the console, statistics."""

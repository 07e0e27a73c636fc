"""From settings and rows to a proven adapter folder."""

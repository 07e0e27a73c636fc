"""Saved adapters at work: one classifier, or many adapters in one batch."""

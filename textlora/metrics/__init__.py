"""Scores and their intervals, calibration, the tables of a report."""

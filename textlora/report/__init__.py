"""Records of a run to pages and figures; imports no torch."""

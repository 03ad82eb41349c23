"""Score generated texts and sampled answers. Pure functions."""

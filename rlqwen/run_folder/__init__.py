"""Create, lock, lay out and restore the folder of a run."""

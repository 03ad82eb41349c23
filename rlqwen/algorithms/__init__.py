"""Compute advantages, losses and KL coefficients: pure math on tensors, with plugins by name and entry point."""

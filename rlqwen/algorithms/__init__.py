"""Advantages, losses and controllers: pure math on tensors, open to plugins by name and entry point."""

"""Rollout engines, one module per engine."""

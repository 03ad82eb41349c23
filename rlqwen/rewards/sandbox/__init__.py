"""Isolate reward workers on Linux without root (rlqwen.rewards.sandbox.sandbox)."""

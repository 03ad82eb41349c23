"""Load, wrap, adapt and write models: policy, reference, critic, adapters, checkpoint formats."""

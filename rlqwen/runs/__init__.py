"""Run recipes: pipelines, restarts, launches on several ranks, exports and proofs of exact resume."""

"""Pack prompts and their continuations into rows that share each prefix, and compute on such rows."""

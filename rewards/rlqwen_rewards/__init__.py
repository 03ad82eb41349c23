"""The built-in rewards; each follows TRL's reward protocol and knows nothing of rlqwen."""

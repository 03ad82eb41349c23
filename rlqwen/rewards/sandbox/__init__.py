"""What an isolated reward worker is kept from, on Linux without root: see rlqwen.rewards.sandbox.sandbox."""

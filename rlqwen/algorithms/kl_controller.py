"""The weight of the KL to the reference, fixed or steered towards a target."""

_MAX_ERROR = 0.2


class KLController:
    """Moves the coefficient up where the policy is further from the reference than wanted, and down where it is nearer.

    coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon, after n completions; Ziegler et al., arXiv 1909.08593,
    section 2.2. Without a target it stays as it is.
    """

    def __init__(self, coef: float, *, target: float | None, horizon: int) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def state_dict(self) -> dict[str, float]:
        """Where the coefficient is."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.coef = state["coef"]

    def observe(self, kl: float, num_completions: int) -> None:
        """Take in the mean KL of a completion, in nats, over a rollout."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1.0, -_MAX_ERROR), _MAX_ERROR)
        self.coef *= 1.0 + error * num_completions / self.horizon

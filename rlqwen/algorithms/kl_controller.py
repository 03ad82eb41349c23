"""Control the coefficient of the KL to the reference: fixed, or adapted towards a target KL."""

_MAX_ERROR = 0.2


class KLController:
    """Raise the coefficient if the KL to the reference is above its target, and lower it if the KL is below.

    After n completions: coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon (Ziegler et al., arXiv 1909.08593,
    section 2.2). Without a target the coefficient is constant.
    """

    def __init__(self, coef: float, *, target: float | None, horizon: int) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the coefficient saved by `state_dict`."""
        self.coef = state["coef"]

    def observe(self, kl: float, num_completions: int) -> None:
        """Adapt the coefficient to the mean KL per completion of a rollout, in nats."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1.0, -_MAX_ERROR), _MAX_ERROR)
        self.coef *= 1.0 + error * num_completions / self.horizon

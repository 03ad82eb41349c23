"""Configure a reference model that follows the policy."""

from pydantic import Field

from rlqwen.config.base import ArgumentsConfig


class SyncedReference(ArgumentsConfig):
    """Arguments of trainers whose reference may follow the policy (TR-DPO, arXiv 2404.09656)."""

    sync_ref_model: bool = False
    """Mix the policy's weights into the reference every `ref_model_sync_steps` updates."""
    ref_model_mixup_alpha: float = Field(default=0.6, ge=0, le=1)
    """Weight of the policy in the new reference; the old reference has the rest."""
    ref_model_sync_steps: int = Field(default=512, ge=1)
    """Updates between two syncs of the reference."""

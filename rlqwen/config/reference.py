"""A reference that follows the policy."""

from pydantic import Field

from rlqwen.config.base import ArgumentsConfig


class SyncedReference(ArgumentsConfig):
    """Arguments of the trainers whose reference may follow the policy (TR-DPO, arXiv 2404.09656)."""

    sync_ref_model: bool = False
    """Mix the policy into the reference every `ref_model_sync_steps` updates."""
    ref_model_mixup_alpha: float = Field(default=0.6, ge=0, le=1)
    """Share of the policy in the new reference."""
    ref_model_sync_steps: int = Field(default=512, ge=1)

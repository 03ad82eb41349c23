"""Direct preference optimisation and its relatives."""

from pydantic import Field

from rlqwen.config.preference import PreferenceConfig


class DPOConfig(PreferenceConfig):
    """Arguments of DPOTrainer; TRL's names, meanings and defaults unless said otherwise."""

    learning_rate: float = Field(default=1e-6, ge=0)

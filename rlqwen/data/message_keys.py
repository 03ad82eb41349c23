"""What the formats of others call the parts of a turn."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Roles of ShareGPT data and of ms-swift's -> the chat template's."""

LOSS_KEYS = ("in_loss", "loss", "loss_scale", "weight", "train", "training")
"""Keys of a turn that say whether it is learned: ours, ms-swift's two, OpenAI's, axolotl's two."""

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which a turn has its thoughts."""

"""List the names of roles and message keys in other data formats."""

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
"""Role in ShareGPT or ms-swift data -> role of the chat template."""

LOSS_KEYS = ("in_loss", "loss", "loss_scale", "weight", "train", "training")
"""Keys that say whether a message is in the loss: ours, two of ms-swift, one of OpenAI, two of axolotl."""

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys that hold the thoughts of a message."""

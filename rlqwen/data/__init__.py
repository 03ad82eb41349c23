"""Load rows from any source, normalize them, and tokenize them to sequences with loss masks or to prompts."""

from rlqwen.data.chat import ChatFormat
from rlqwen.data.cleaning import CleaningReport, clean_rows
from rlqwen.data.data_report import DataReport
from rlqwen.data.encoding import TokenizedRow
from rlqwen.data.preference_examples import tokenize_preference_examples
from rlqwen.data.preference_rows import LabelledRow, PreferenceRow
from rlqwen.data.preference_tokenization import tokenize_labelled, tokenize_preferences
from rlqwen.data.prompts import find_prompt, find_prompts, longest_prompt, tokenize_prompts
from rlqwen.data.recipe_data import RecipeData, clean_recipe_data, first_rows, load_recipe_data
from rlqwen.data.reward_tokenization import reward_model_segments, tokenize_reward_rows
from rlqwen.data.sft_tokenization import tokenize_conversation, tokenize_sft
from rlqwen.data.sources import as_rows, load_rows
from rlqwen.data.template_source import load_chat_template

__all__ = [
    "ChatFormat",
    "CleaningReport",
    "DataReport",
    "LabelledRow",
    "PreferenceRow",
    "RecipeData",
    "TokenizedRow",
    "as_rows",
    "clean_recipe_data",
    "clean_rows",
    "find_prompt",
    "find_prompts",
    "first_rows",
    "load_chat_template",
    "load_recipe_data",
    "load_rows",
    "longest_prompt",
    "reward_model_segments",
    "tokenize_conversation",
    "tokenize_labelled",
    "tokenize_preference_examples",
    "tokenize_preferences",
    "tokenize_prompts",
    "tokenize_reward_rows",
    "tokenize_sft",
]

"""Real models for the tests: every form of the demo model, built from small committed files."""

from tests.models.forms import FORMS, model_path
from tests.models.pycode import HELDOUT, PROMPTS, TOKENIZER, heldout_ids, prompt_ids

__all__ = [
    "FORMS",
    "HELDOUT",
    "PROMPTS",
    "TOKENIZER",
    "heldout_ids",
    "model_path",
    "prompt_ids",
]

"""
A page to look at the effect of α: what the original model and the extrapolated one answer, token by token. The page
itself, which needs gradio, is imported from `hf_unlearn.playground.page`.
"""

from hf_unlearn.playground.comparison import Comparison
from hf_unlearn.playground.prompts import KnownPrompt, known_prompts
from hf_unlearn.playground.tokens import Token, spell


__all__ = ["Comparison", "KnownPrompt", "Token", "known_prompts", "spell"]

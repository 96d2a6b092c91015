"""The OpenAI dialect: models, completions and chat completions, for any client that speaks it."""

from gateway.openai.backend import Backend, ServedModel, Target
from gateway.openai.errors import HUNG_UP, render_error
from gateway.openai.passing_on import Passage
from gateway.openai.routes import router

__all__ = ["HUNG_UP", "Backend", "Passage", "ServedModel", "Target", "render_error", "router"]

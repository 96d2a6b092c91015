"""The OpenAI dialect: models, completions and chat completions, for any client that speaks it."""

from gateway.openai.backend import Backend, ServedModel, Target
from gateway.openai.errors import render_error
from gateway.openai.routes import router

__all__ = ["Backend", "ServedModel", "Target", "render_error", "router"]

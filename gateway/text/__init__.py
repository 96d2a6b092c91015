"""Text and tokens in the gateway: a tokenizer, text that grows token by token, chat templates."""

from gateway.text.codec import TextCodec
from gateway.text.pieces import IncrementalDecoder
from gateway.text.template import ChatTemplate

__all__ = ["ChatTemplate", "IncrementalDecoder", "TextCodec"]

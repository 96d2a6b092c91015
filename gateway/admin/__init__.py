"""The admin API: what a gateway holds and does, for people who run it and for their programs."""

from gateway.admin.routes import router

__all__ = ["router"]

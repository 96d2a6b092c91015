"""The Tinker dialect: what the official `tinker` SDK speaks. Own schemas; see docs/tinker.md for what is served."""

from gateway.tinker.accounts import router as accounts
from gateway.tinker.copies import router as copies
from gateway.tinker.custom_losses import router as custom_losses
from gateway.tinker.exports import router as exports
from gateway.tinker.futures import router as futures
from gateway.tinker.registry import router as registry
from gateway.tinker.sampling import router as sampling
from gateway.tinker.session_registry import router as session_registry
from gateway.tinker.sessions import router as sessions
from gateway.tinker.traces import router as traces
from gateway.tinker.training import router as training
from gateway.tinker.unserved import router as unserved
from gateway.tinker.weights import router as weights

routes = [
    route
    for topic in (
        futures,
        training,
        sampling,
        weights,
        sessions,
        registry,
        session_registry,
        traces,
        accounts,
        exports,
        copies,
        custom_losses,
    )
    for route in topic.routes
]
"""Every route, the busiest first: they are tried in order."""

last_routes = unserved.routes
"""For whatever no other route of the application takes."""

__all__ = ["last_routes", "routes"]

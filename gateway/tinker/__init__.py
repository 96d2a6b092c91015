"""The Tinker dialect: what the official `tinker` SDK speaks. Own schemas; see docs/tinker.md for what is served."""

from fastapi import APIRouter

from gateway.tinker.futures import router as futures
from gateway.tinker.registry import router as registry
from gateway.tinker.sampling import router as sampling
from gateway.tinker.sessions import router as sessions
from gateway.tinker.training import router as training
from gateway.tinker.weights import router as weights

router = APIRouter(prefix="/api/v1", tags=["tinker"])
for topic in (
    futures,
    training,
    sampling,
    weights,
    sessions,
    registry,
):  # routes are tried in order: the busiest first
    router.include_router(topic)

__all__ = ["router"]

"""The admin API: what a gateway holds and does, for people who run it and for their programs."""

from fastapi import APIRouter

router = APIRouter(prefix="/admin/v1", tags=["admin"])

__all__ = ["router"]

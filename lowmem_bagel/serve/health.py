"""How the server stands, for those who watch over it."""

from __future__ import annotations

from typing import Any, Literal

from .service import LOADING_SECONDS, Service

Standing = Literal["loading", "ready", "closing", "failed"]


def standing(service: Service) -> Standing:
    if service.failure is not None:
        return "failed"
    if service.closing:
        return "closing"
    return "loading" if service.loaded is None else "ready"


def health(service: Service) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status code, headers and body of `/health`: 200 where requests are taken in, 503 before and after."""
    now = standing(service)
    done, total = service.bytes_loaded
    body = {
        "status": now,
        "model": service.name,
        "loading": {"bytes": done, "total_bytes": total},
        "queue": {"waiting": len(service.queue.order()), "limit": service.queue.limit},
        "running": service.worker.running is not None,
    }
    if now == "ready":
        return 200, {}, body
    return 503, {"retry-after": f"{LOADING_SECONDS:.0f}"}, body

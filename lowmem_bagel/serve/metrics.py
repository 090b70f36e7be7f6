"""What the server has done and how it stands, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..errors import Cancelled, TimeLimitError
from ..settings import AnswerSettings, TextSettings
from .jobs import Job
from .service import Service

if TYPE_CHECKING:
    from ..settings import Task

PREFIX = "lowmem_bagel"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800, 3600)
"""From an answer on a fast card to a picture on a processor."""


class Metrics:
    """One service's, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(Standing(service))
        about = {"namespace": PREFIX, "registry": self.registry}
        self.requests = Counter("requests", "Requests that ended", ("task", "outcome"), **about)  # type: ignore[arg-type]
        self.waiting = Histogram("waiting_seconds", "Time in the queue", ("task",), buckets=SECONDS, **about)  # type: ignore[arg-type]
        self.running = Histogram("running_seconds", "Time on the device", ("task",), buckets=SECONDS, **about)  # type: ignore[arg-type]
        self.steps = Counter("steps", "Steps of pictures", **about)  # type: ignore[arg-type]
        self.tokens = Counter("tokens", "Tokens of texts, of requests that were done", **about)  # type: ignore[arg-type]
        self.answers = Counter("http_responses", "Answers to HTTP requests", ("code",), **about)  # type: ignore[arg-type]
        service.ended.append(self._ended)

    def answered(self, status: int) -> None:
        self.answers.labels(str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)

    def _ended(self, job: Job) -> None:
        now, task = time.monotonic(), task_of(job)
        began = now if job.started is None else job.started
        self.requests.labels(task, outcome_of(job)).inc()
        self.waiting.labels(task).observe(began - job.created)
        self.steps.inc(job.progress.step)
        if job.started is not None:
            self.running.labels(task).observe(now - job.started)
        if job.progress.result is not None:
            self.tokens.inc(len(job.progress.result.token_ids))


class Standing(Collector):
    """What is read from the service when it is asked for."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        service = self.service
        done, total = service.bytes_loaded
        yield _gauge("queue_length", "Requests that wait", len(service.queue.order()))
        yield _gauge("queue_limit", "Requests that may wait", service.queue.limit)
        yield _gauge("running", "Requests on the device", service.worker.running is not None)
        yield _gauge("ready", "Whether the model is loaded and requests are taken in", is_ready(service))
        yield _gauge("loaded_bytes", "Bytes of the model that are loaded", done)
        yield _gauge("loading_bytes", "Bytes of the model in all", total)
        if service.loaded is not None and service.loaded.plan.device.startswith("cuda"):
            yield from _device(service.loaded.plan.device)


def is_ready(service: Service) -> bool:
    return service.loaded is not None and not service.closing


def task_of(job: Job) -> Task | Literal["chat"]:
    if isinstance(job.prepared.settings, AnswerSettings):
        return "chat"
    if isinstance(job.prepared.settings, TextSettings):
        return "ask"
    return "edit" if job.request.picture_sizes else "generate"


def outcome_of(job: Job) -> str:
    error = job.progress.error
    if error is None:
        return "done"
    return (
        "cancelled" if isinstance(error, Cancelled) else "time_limit" if isinstance(error, TimeLimitError) else "failed"
    )


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", help, float(value))


def _device(device: str) -> Iterator[Metric]:
    import torch

    memory = torch.cuda
    yield _gauge("device_allocated_bytes", "Device memory that tensors have", memory.memory_allocated(device))
    yield _gauge("device_reserved_bytes", "Device memory that PyTorch holds", memory.memory_reserved(device))
    yield _gauge("device_total_bytes", "Memory of the device", memory.get_device_properties(device).total_memory)

"""A request of the page, followed without a browser: views until it is over, and cancelled by whoever leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.serving import LONG, PROMPT, QUICK, running_service, service_of, until

from lowmem_bagel.errors import BusyError, Cancelled, ImageError, SettingError
from lowmem_bagel.serve.page.actions import Clients, View, Wish
from lowmem_bagel.serve.service import Service


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(queue=1) as made:
        yield made


async def views(clients: Clients, wish: Wish, client: str = "a") -> list[View]:
    return [view async for view in clients.follow(client, "draw", wish)]


def drawing(**settings: object) -> Wish:
    return Wish([PROMPT], "image", {**QUICK, **settings})


def test_a_picture_is_followed_to_its_end(service: Service) -> None:
    seen = asyncio.run(views(Clients(service), drawing()))
    assert [view.progress.over for view in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1].progress.state == "done" and seen[-1].progress.result is not None
    assert all(view.job is not None and view.job.previews for view in seen)


def test_an_uploaded_picture_is_opened_within_our_bounds(service: Service, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    asked = Wish([tmp_path / "red.png", "What color is it?"], "text", {"max_new_tokens": 3})
    assert asyncio.run(views(Clients(service), asked))[-1].progress.state == "done"
    (tmp_path / "none.png").write_bytes(b"no picture")
    [refused] = asyncio.run(views(Clients(service), Wish([tmp_path / "none.png", "x"], "text", {})))
    assert isinstance(refused.error, ImageError)


def test_what_is_impossible_is_one_view(service: Service) -> None:
    [refused] = asyncio.run(views(Clients(service), drawing(num_timesteps=1)))
    assert isinstance(refused.error, SettingError) and refused.job is None


def test_a_full_queue_says_when_to_come_back(service: Service) -> None:
    running = service.submit([PROMPT], "image", LONG, "b")
    until(lambda: running.progress.step)
    waiting = service.submit([PROMPT], "image", LONG, "b")
    [refused] = asyncio.run(views(Clients(service), drawing()))
    assert isinstance(refused.error, BusyError)
    service.cancel(waiting)
    service.cancel(running)


def test_cancelled_in_its_tab_and_in_no_other(service: Service) -> None:
    clients = Clients(service)

    async def course() -> View:
        view = None
        async for view in clients.follow("a", "draw", Wish([PROMPT], "image", LONG)):
            clients.cancel("b", "draw")
            clients.cancel("a", "edit")
            if view.progress.step:
                clients.cancel("a", "draw")
        assert view is not None
        return view

    assert isinstance(asyncio.run(course()).error, Cancelled)


@pytest.mark.parametrize("how", ["leave", "close", "cancel"])
def test_who_goes_away_cancels_what_runs(service: Service, how: str) -> None:
    clients = Clients(service)

    async def course() -> None:
        following = clients.follow("a", "draw", Wish([PROMPT], "image", LONG))
        async for view in following:
            if view.progress.step:
                break
        if how == "leave":
            clients.leave("a")
        elif how == "close":
            await following.aclose()  # type: ignore[attr-defined]
        else:
            task = asyncio.ensure_future(following.__anext__())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(course())
    until(lambda: service.worker.running is None)


def test_who_goes_away_while_the_request_is_checked_leaves_no_job_behind(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    checking, go_on = threading.Event(), threading.Event()
    submit = service.submit

    def slow(*given: object, **more: object) -> object:
        checking.set()
        go_on.wait(10)
        return submit(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(service, "submit", slow)

    async def course() -> None:
        task = asyncio.ensure_future(views(Clients(service), Wish([PROMPT], "image", LONG)))
        await asyncio.to_thread(checking.wait, 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()

    asyncio.run(course())
    until(lambda: service.worker.running is None and not service.queue.order())


def test_before_the_model_is_there_it_says_so() -> None:
    [refused] = asyncio.run(views(Clients(service_of()), drawing()))
    assert isinstance(refused.error, BusyError)
    assert "loading" in str(refused.error)

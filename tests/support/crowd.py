"""Many clients at once, in a process of their own: `python crowd.py URL REQUESTS CLIENTS TRIES` prints what each got.

Each request is an answer of one token, which takes the demo checkpoint some ten milliseconds. Refused with 429, a
client comes again up to TRIES times, as soon as it may, and at once where the test is to be short.
"""

from __future__ import annotations

import asyncio
import json
import sys

import httpx

BODY = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 1}
PAUSE = 0.1


async def one(client: httpx.AsyncClient, tries: int) -> list[object]:
    """Status, Retry-After, and whether an answer was in it."""
    for left in reversed(range(tries)):
        answer = await client.post("/v1/chat/completions", json=BODY)
        if answer.status_code != 429 or not left:
            break
        await asyncio.sleep(PAUSE)
    whole = answer.status_code == 200 and bool(answer.json()["choices"][0]["message"])
    return [answer.status_code, answer.headers.get("retry-after"), whole]


async def crowd(url: str, requests: int, clients: int, tries: int) -> list[list[object]]:
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    gate = asyncio.Semaphore(clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False, verify=False) as client:

        async def waiting() -> list[object]:
            async with gate:
                return await one(client, tries)

        return await asyncio.gather(*(waiting() for _ in range(requests)))


if __name__ == "__main__":
    address, *counts = sys.argv[1:]
    print(json.dumps(asyncio.run(crowd(address, *map(int, counts)))))

"""`lowmem-bagel bench batch`: a batch whose process is killed at random moments, and others one of whose workers is,
beside one that nothing disturbs: each job once, and the same pictures.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_bagel.batch.folder import PARTIAL, RESULTS

from ..options import Out

COLORS, SHAPES = ("red", "blue", "green", "yellow", "purple", "orange"), ("circle", "square", "triangle", "diamond")
WAIT = 0.02
"""Seconds between two looks."""
FEW = 0.3
"""Seconds that a worker has been at its job when it is killed, at most."""
Command = Sequence[str]


def batch_command(
    jobs: Annotated[int, typer.Option(help="Jobs of the file.", min=20)] = 500,
    kills: Annotated[int, typer.Option(help="Times that the process is killed.")] = 20,
    num_timesteps: Annotated[int, typer.Option(help="Timesteps a picture.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    teams: Annotated[
        bool, typer.Option(help="Also two workers, as processes and on Ray, one of which is killed.")
    ] = True,
    out: Out = Path("batch.json"),
) -> None:
    """Run the embedded model on this machine's processor, undisturbed and disturbed, and write a JSON record."""
    from ..record import write_record

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_jobs(place / "jobs.jsonl", jobs, num_timesteps)
        told, wanted = undisturbed(place)
        results: dict[str, Any] = {"undisturbed": told}
        results["killed"] = killed(place, wanted, told, kills, random.Random(seed))
        if teams:
            results["processes"] = worker_killed(place, wanted, "processes", ["--devices", "cpu,cpu"])
            results["ray"] = worker_killed(place, wanted, "ray", ["--ray", "local", "--ray-workers", "2"])
    settings = {"jobs": jobs, "kills": kills, "num_timesteps": num_timesteps, "seed": seed}
    write_record(out, "batch", settings, results)
    print(json.dumps(results, indent=1), flush=True)


def write_jobs(path: Path, jobs: int, num_timesteps: int) -> None:
    """Of ten jobs, five draw, two edit, two ask and one is wrong: a malformed line and a missing picture by turns."""
    picture = _drawn(path.parent)
    lines = [json.dumps(_job(number, picture, num_timesteps)) for number in range(jobs)]
    lines[9::20] = [line[:-2] for line in lines[9::20]]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _job(number: int, picture: str, num_timesteps: int) -> dict[str, Any]:
    what = f"a {COLORS[number % 6]} {SHAPES[number // 6 % 4]} on a white background"
    if number % 10 in (2, 6, 9):
        missing = number % 10 == 9
        image = "nowhere.png" if missing else picture
        return {"task": "edit", "image": image, "prompt": "make it red", "num_timesteps": num_timesteps}
    if number % 10 in (4, 8):
        return {"task": "ask", "image": picture, "prompt": f"Is there {what}?", "do_sample": True, "max_new_tokens": 8}
    return {"prompt": what, "num_timesteps": num_timesteps}


def _drawn(folder: Path) -> str:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 90, 90), fill="blue")
    image.save(folder / "picture.png")
    return "picture.png"


def undisturbed(place: Path) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """How it went, and what it came to."""
    begun = time.monotonic()
    process = start(place, "undisturbed", ["--device", "cpu"])
    first = None
    while process.poll() is None:
        if first is None and any((place / "undisturbed").glob("*.png")):
            first = time.monotonic() - begun
        time.sleep(WAIT)
    assert first is not None
    states = [result["state"] for result in results_of(place / "undisturbed")]
    told = {"done": states.count("done"), "failed": states.count("failed"), "seconds": time.monotonic() - begun}
    return {**told, "first_picture_seconds": first}, contents(place / "undisturbed")


def killed(
    place: Path, wanted: Mapping[str, bytes], usual: Mapping[str, Any], kills: int, moments: random.Random
) -> dict[str, Any]:
    """Kill the process at random moments of its life, from its start on, and then let it end."""
    out, first = place / "killed", usual["first_picture_seconds"]
    longest = first + 1.5 * (usual["seconds"] - first) / max(1, kills)
    begun, seen = time.monotonic(), []
    for _ in range(kills):
        process = start(place, "killed", ["--device", "cpu"])
        after = moments.uniform(0, longest)
        time.sleep(after)
        process.kill()
        came_first = process.wait() == -signal.SIGKILL
        seen.append({"after_seconds": after, "before_its_end": came_first, **left(out)})
    code = start(place, "killed", ["--device", "cpu"]).wait()
    return {"kills": seen, "exit_code": code, "seconds": time.monotonic() - begun, **compared(out, wanted)}


def worker_killed(place: Path, wanted: Mapping[str, bytes], name: str, flags: Command) -> dict[str, Any]:
    """Kill one of two workers in the midst of a job, once a part of the jobs is done."""
    out, begun = place / name, time.monotonic()
    process = start(place, name, flags)
    is_worker = _is_at_work if name == "ray" else _is_spawned
    while len(results_of(out)) < len(results_of(place / "undisturbed")) // 4 and process.poll() is None:
        time.sleep(WAIT)
    victims: list[int] = []
    while not victims and process.poll() is None:
        victims = [pid for pid in descendants(process.pid) if is_worker(pid)]
    time.sleep(random.uniform(0, FEW))
    for pid in victims[:1]:
        os.kill(pid, signal.SIGKILL)
    code = process.wait()
    said = (place / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return {
        "killed": len(victims[:1]), "said": [line for line in said if " while it did " in line][:3], "exit_code": code,
        "seconds": time.monotonic() - begun, **compared(out, wanted),
    }  # fmt: skip


def start(place: Path, out: str, flags: Command) -> subprocess.Popen[bytes]:
    """The command, which says what it says into a file."""
    program = [sys.executable, "-c", "from lowmem_bagel.cli import main; main()", "batch", "jobs.jsonl", out, *flags]
    with (place / f"{out}.txt").open("ab") as said:
        return subprocess.Popen(program, cwd=place, stdout=subprocess.DEVNULL, stderr=said)


def results_of(out: Path) -> list[dict[str, Any]]:
    """Of every whole line."""
    path = out / RESULTS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def left(out: Path) -> dict[str, int]:
    """What a kill left: whole results, and what is not whole or has no result."""
    found = results_of(out)
    content = (out / RESULTS).read_bytes() if (out / RESULTS).exists() else b""
    pictures = {path.name for path in out.glob("*.png")}
    return {
        "results": len(found),
        "torn_lines": int(bool(content) and not content.endswith(b"\n")),
        "unfinished_files": len([*out.glob(PARTIAL.format("*"))]),
        "pictures_without_a_result": len(pictures - {name for result in found for name in result["files"]}),
    }


def contents(out: Path) -> dict[str, bytes]:
    """Pictures byte for byte, and results but for their seconds."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".png"}
    for result in results_of(out):
        found[f"result {result['id']}"] = json.dumps({**result, "seconds": 0}, sort_keys=True).encode()
    return found


def compared(out: Path, wanted: Mapping[str, bytes]) -> dict[str, Any]:
    """Whether each job has one result, and all is what the undisturbed run came to."""
    found, lines = contents(out), results_of(out)
    ids = {result["id"] for result in lines}
    other = [name for name in {*found, *wanted} if found.get(name) != wanted.get(name)]
    return {
        "results": len(lines), "each_once": len(ids) == len(lines) == sum(n.startswith("result ") for n in wanted),
        "pictures": sum(name.endswith(".png") for name in found), "different": len(other),
        "left_over": left(out)["unfinished_files"],
    }  # fmt: skip


def descendants(pid: int) -> Iterator[int]:
    """Processes that were started by a process, or by those."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    for child in parents:
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and child != pid:
            yield child


def _is_spawned(pid: int) -> bool:
    return "spawn_main" in _words(pid)


def _is_at_work(pid: int) -> bool:
    """Ray calls its processes after what they do."""
    return "Actor.work" in _words(pid)


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""

"""Makes the demo checkpoint from nothing: `python -m lowmem_bagel.benchmarks.demo.make OUT`.

Autoencoder, decoder, export, and a first look at held-out scenes: about 9 minutes on one H200 by the default limits.
With --resume, an exported checkpoint's decoder is trained on; --intermediate-size gives it more room to learn in.
--mixture says which tasks of `mixture.TASKS` it learns, and how many of their contexts a step has: to teach what it was
not made with, train it on the old and the new together. --weights says how much the losses count against each other.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.vae import Vae

from .clip_cases import CASES, measure
from .data import Examples, make_examples
from .export import export_checkpoint, load_checkpoint
from .forward import new_bagel
from .layout import GRID, demo_config, write_configs
from .mixture import STILLS, TASKS, Task, mixture, shares
from .sampler import Sampler, measure_conversations, quick_measure
from .tokens import build_tokenizer, sample_sentences, special_ids, write_tokenizer
from .train import Encoded, Trainer, prepare
from .train_vae import VaeTrainer, reconstruction_psnr
from .widen import widened

SENTENCE_SCENES = 6000
VAE_EXAMPLES = 30_000
ENCODE_BATCH = 512

Say = Callable[[str], None]


def make(options: argparse.Namespace) -> None:
    """Train, export and look, as `options` say."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f}] {text}", flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    _tokenizer_files(out, options.resume)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    special = special_ids(tokenizer)
    tasks = {
        name: TASKS[name].scaled(share / options.batch_divisor).weighted(options.weights.get(name, 1))
        for name, share in options.mixture.items()
    }
    counts = {"scenes": options.examples, "clips": options.clips, "views": options.views}
    counts = {kind: count for kind, count in counts.items() if any(task.kind == kind for task in tasks.values())}

    with ThreadPoolExecutor(1) as thread:
        # Other processes make the many examples of the decoder while the autoencoder trains on a few.
        few = {"scenes": min(VAE_EXAMPLES, options.examples)}
        first = None if options.resume else _examples(options, few, options.seed + 1)
        making = thread.submit(_examples, options, counts, options.seed)
        if first is not None:
            vae = _autoencoder(options, first, device, say)
            torch.save(vae.state_dict(), out / "vae.pt")
            examples = making.result()
            data, scale, shift = prepare(vae, examples, tasks, device, ENCODE_BATCH)
            config = demo_config(scale, shift)
            bagel = new_bagel(config, device, GRID)
        else:
            bagel, vae, config = load_checkpoint(options.resume, device)
            if options.intermediate_size:
                bagel, config = widened(bagel, config, options.intermediate_size)
            examples = making.result()
            known = (config.vae.scale_factor, config.vae.shift_factor)
            data, scale, shift = prepare(vae, examples, tasks, device, ENCODE_BATCH, known)
    say(f"{sum(map(len, examples))} examples encoded: scale {scale:.4f}, shift {shift:.4f}")
    steps = _train(options, bagel, data, special, tasks, say, started)

    write_configs(config, out, special)
    export_checkpoint(bagel, vae, config, out)
    say("exported")
    canvases = list(dict.fromkeys(e.canvas for e in examples))
    samplers = [Sampler(bagel, vae, scale, shift, tokenizer, special, canvas) for canvas in canvases]
    record = {"steps": steps, "seconds": 0.0, "tasks": list(tasks)}

    def write() -> None:
        record["seconds"] = round(time.monotonic() - started, 1)
        (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")

    for name, result in _looks(samplers, options, list(tasks)):
        _contact_sheet(result.pop("pictures"), out / f"look_{name}.png")
        say(f"{name}: " + ", ".join(f"{k} {v}" for k, v in result.items() if isinstance(v, int | float)))
        record[name] = result
        write()  # each time, so that what a limit cuts off loses only what comes after
    write()
    say("done")


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Of a command line, by default the program's."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint and write it to a folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", type=Path, help="an exported checkpoint whose decoder to train on")
    parser.add_argument("--intermediate-size", type=int, help="widen its feed-forward layers to this")
    told = ",".join(f"{name}={share:g}" for name, share in STILLS.items())
    parser.add_argument(
        "--mixture", type=_argument(mixture), default=told, help=f"of {', '.join(TASKS)}; default {told}"
    )
    parser.add_argument(
        "--weights", type=_argument(shares), default={}, help="factors on the tasks' losses, as --mixture"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--examples", type=int, default=150_000, help="scenes")
    parser.add_argument("--clips", type=int, default=60_000)
    parser.add_argument("--views", type=int, default=30_000)
    parser.add_argument("--vae-steps", type=int, default=20_000)
    parser.add_argument("--vae-seconds", type=float, default=80)
    parser.add_argument("--vae-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20_000, help="limit for the decoder")
    parser.add_argument("--seconds", type=float, default=380, help="for the decoder")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds after the start that training is over")
    parser.add_argument("--batch-divisor", type=float, default=1, help="divide all batches of the decoder's training")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--measure", type=int, default=200, help="held-out requests of a kind")
    parser.add_argument("--timesteps", type=int, default=50)
    parser.add_argument("--min-psnr", type=float, default=33, help="stop where the autoencoder is worse, in dB")
    parser.add_argument("--seed", type=int, default=33)
    given = parser.parse_args(arguments)
    if given.intermediate_size and not given.resume:
        parser.error("--intermediate-size widens the checkpoint that --resume names; give that too")
    return given


def _argument(parse: Callable[[str], dict[str, float]]) -> Callable[[str], dict[str, float]]:
    def parsed(text: str) -> dict[str, float]:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _tokenizer_files(out: Path, resume: Path | None) -> None:
    if resume is None:
        write_tokenizer(build_tokenizer(sample_sentences(SENTENCE_SCENES)), out)
        return
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(resume / name, out / name)


def _examples(options: argparse.Namespace, counts: Mapping[str, int], seed: int) -> list[Examples]:
    return make_examples(counts, options.out / "tokenizer.json", seed, options.workers)


def _autoencoder(options: argparse.Namespace, examples: list[Examples], device: torch.device, say: Say) -> Vae:
    rows = [
        (e.canvas, torch.from_numpy(np.concatenate((e.pictures["source"], e.pictures["target"]))).to(device))
        for e in examples
    ]
    trainer = VaeTrainer(demo_config().vae, rows, options.vae_batch, device)
    vae = trainer.train(options.vae_steps, options.vae_seconds, say)
    psnr = reconstruction_psnr(vae, rows, 256)
    say("autoencoder: " + ", ".join(f"{p:.2f} dB" for p in psnr))
    if min(psnr) < options.min_psnr:
        raise SystemExit(f"the autoencoder reached {min(psnr):.2f} dB, under --min-psnr; train it longer")
    return vae


def _train(
    options: argparse.Namespace,
    bagel: Bagel,
    data: list[Encoded],
    special: dict[str, int],
    tasks: Mapping[str, Task],
    say: Say,
    started: float,
) -> int:
    """The decoder's training; returns its steps."""
    trainer = Trainer(bagel, data, special, tasks, options.rate)
    trainer.warm_up()
    say("training step ready")
    left = options.until - (time.monotonic() - started)
    steps = trainer.train(options.steps, max(0.01, min(options.seconds, left)), say)
    say(f"{steps} steps done")
    trainer.use_average()
    return steps


def _looks(
    samplers: Sequence[Sampler], options: argparse.Namespace, tasks: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Quick measurements: of what the tasks teach beside stills on the first canvas, of stills on each, on all but the
    first a quarter as long."""
    seed, timesteps, first = 12345, options.timesteps, samplers[0]
    for name in CASES:
        if name in tasks:
            paint = partial(first.paint, timesteps=timesteps)
            yield name, measure(name, paint, options.measure, seed)
            if name == "future":  # guidance repeats a shape's place with more weight than it was learnt with
                yield "future_unguided", measure(name, partial(paint, guided=False), options.measure, seed)
    if "converse" in tasks:
        yield "converse", measure_conversations(first, options.measure, seed, timesteps)
    for sampler in samplers:
        count = options.measure if sampler is first else max(2, options.measure // 4)
        result = quick_measure(sampler, count, seed, timesteps)
        yield f"{sampler.canvas.height}x{sampler.canvas.width}", result


def _contact_sheet(pictures: Sequence[Sequence[np.ndarray[Any, Any]]], path: Path) -> None:
    """The first pictures, those of a request or a task side by side."""
    from PIL import Image

    rows = [list(some)[:32] for some in pictures][:32]
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + 4), len(rows) * (height + 4)))
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (across * (width + 4), down * (height + 4)))
    sheet.save(path)


if __name__ == "__main__":
    make(options())

"""Makes the demo checkpoint from nothing: `python -m lowmem_bagel.benchmarks.demo.make OUT`.

Autoencoder, decoder, export, and a first look at held-out scenes: about 9 minutes on one H200 by the default limits.
With --resume, an exported checkpoint's decoder is trained on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.vae import Vae

from .data import Examples, make_examples
from .export import export_checkpoint, load_checkpoint
from .forward import new_bagel
from .layout import GRID, demo_config, write_configs
from .sampler import Sampler, quick_measure
from .tokens import build_tokenizer, sample_sentences, special_ids, write_tokenizer
from .train import BatchSizes, CanvasData, Trainer, prepare
from .train_vae import VaeTrainer, reconstruction_psnr

SENTENCE_SCENES = 6000
VAE_EXAMPLES = 30_000
ENCODE_BATCH = 512

Say = Callable[[str], None]


def main() -> None:
    options = _options()
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

    with ThreadPoolExecutor(1) as thread:
        # Other processes make the many examples of the decoder while the autoencoder trains on a few.
        few = None if options.resume else _examples(options, min(VAE_EXAMPLES, options.examples), options.seed + 1)
        making = thread.submit(_examples, options, options.examples, options.seed)
        if few is not None:
            vae = _autoencoder(options, few, device, say)
            torch.save(vae.state_dict(), out / "vae.pt")
            examples = making.result()
            data, scale, shift = prepare(vae, examples, device, ENCODE_BATCH)
            config = demo_config(scale, shift)
            bagel = new_bagel(config, device, GRID)
        else:
            bagel, vae, config = load_checkpoint(options.resume, device)
            examples = making.result()
            known = (config.vae.scale_factor, config.vae.shift_factor)
            data, scale, shift = prepare(vae, examples, device, ENCODE_BATCH, known)
    say(f"{sum(map(len, examples))} examples encoded: scale {scale:.4f}, shift {shift:.4f}")
    steps = _train(options, bagel, data, special, say)

    write_configs(config, out, special)
    export_checkpoint(bagel, vae, config, out)
    say("exported")
    canvases = [e.canvas for e in examples]
    samplers = [Sampler(bagel, vae, scale, shift, tokenizer, special, canvas) for canvas in canvases]
    measured = [_look(s, options, out, say, first=s is samplers[0]) for s in samplers]
    record = {"steps": steps, "seconds": round(time.monotonic() - started, 1), "measured": measured}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    say("done")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint and write it to a folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", type=Path, help="an exported checkpoint whose decoder to train on")
    parser.add_argument("--examples", type=int, default=150_000)
    parser.add_argument("--vae-steps", type=int, default=20_000)
    parser.add_argument("--vae-seconds", type=float, default=80)
    parser.add_argument("--vae-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20_000, help="limit for the decoder")
    parser.add_argument("--seconds", type=float, default=380, help="for the decoder")
    parser.add_argument("--batch-divisor", type=int, default=1, help="divide all batches of the decoder's training")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--measure", type=int, default=200, help="held-out scenes to draw, edit and ask about")
    parser.add_argument("--timesteps", type=int, default=50)
    parser.add_argument("--min-psnr", type=float, default=33, help="stop where the autoencoder is worse, in dB")
    parser.add_argument("--seed", type=int, default=33)
    return parser.parse_args()


def _tokenizer_files(out: Path, resume: Path | None) -> None:
    if resume is None:
        write_tokenizer(build_tokenizer(sample_sentences(SENTENCE_SCENES)), out)
        return
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(resume / name, out / name)


def _examples(options: argparse.Namespace, count: int, seed: int) -> list[Examples]:
    return make_examples(count, options.out / "tokenizer.json", seed, options.workers)


def _autoencoder(options: argparse.Namespace, examples: list[Examples], device: torch.device, say: Say) -> Vae:
    rows = [(e.canvas, torch.from_numpy(np.concatenate((e.source, e.target))).to(device)) for e in examples]
    trainer = VaeTrainer(demo_config().vae, rows, options.vae_batch, device)
    vae = trainer.train(options.vae_steps, options.vae_seconds, say)
    psnr = reconstruction_psnr(vae, rows, 256)
    say("autoencoder: " + ", ".join(f"{p:.2f} dB" for p in psnr))
    if min(psnr) < options.min_psnr:
        raise SystemExit(f"the autoencoder reached {min(psnr):.2f} dB, under --min-psnr; train it longer")
    return vae


def _train(options: argparse.Namespace, bagel: Bagel, data: list[CanvasData], special: dict[str, int], say: Say) -> int:
    """The decoder's training; returns its steps."""
    trainer = Trainer(bagel, data, special, BatchSizes().divided(options.batch_divisor))
    trainer.warm_up()
    say("training step ready")
    steps = trainer.train(options.steps, options.seconds, say)
    say(f"{steps} steps done")
    trainer.use_average()
    return steps


def _look(sampler: Sampler, options: argparse.Namespace, out: Path, say: Say, first: bool) -> dict[str, Any]:
    """A quick measurement on one canvas (a quarter as long on all but the first), with a contact sheet."""
    canvas = sampler.canvas
    count = options.measure if first else max(2, options.measure // 4)
    result = quick_measure(sampler, count, 12345, options.timesteps)
    _contact_sheet(result.pop("pictures"), out / f"look_{canvas.height}x{canvas.width}.png")
    say(", ".join(f"{k} {v}" for k, v in result.items() if isinstance(v, int)))
    return {"canvas": [canvas.height, canvas.width], **result}


def _contact_sheet(pictures: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], path: Path) -> None:
    from PIL import Image

    shown = [p for batch in pictures for p in batch[:32]]
    height, width = shown[0].shape[:2]
    sheet = Image.new("RGB", (16 * (width + 4), -(-len(shown) // 16) * (height + 4)))
    for i, picture in enumerate(shown):
        sheet.paste(Image.fromarray(picture), ((i % 16) * (width + 4), (i // 16) * (height + 4)))
    sheet.save(path)


if __name__ == "__main__":
    main()

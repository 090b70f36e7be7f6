"""Makes the demo checkpoint from nothing: `python -m lowmem_bagel.benchmarks.demo.make OUT`.

About 13 minutes on one H200: data, autoencoder, decoder, export, and a first look at held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from .data import make_examples
from .export import export_checkpoint
from .forward import new_bagel
from .layout import GRID, demo_config, write_configs
from .sampler import Sampler, quick_measure
from .tokens import SPECIAL, build_tokenizer, sample_sentences, write_tokenizer
from .train import BatchSizes, Trainer, prepare
from .train_vae import train_vae

SENTENCE_SCENES = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint and write it to a folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=250_000)
    parser.add_argument("--vae-steps", type=int, default=12_000)
    parser.add_argument("--vae-seconds", type=float, default=165)
    parser.add_argument("--vae-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--seconds", type=float, default=440)
    parser.add_argument("--batch-divisor", type=int, default=1, help="divide all batches of the decoder's training")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--measure", type=int, default=200, help="held-out scenes to draw, edit and ask about")
    parser.add_argument("--timesteps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f}] {text}", flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer(sample_sentences(SENTENCE_SCENES))
    write_tokenizer(tokenizer, out)
    special = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    say("tokenizer written")
    examples = make_examples(options.examples, out / "tokenizer.json", options.seed, options.workers)
    say(f"{sum(map(len, examples))} examples")

    config = demo_config()
    rows = [(e.canvas, torch.from_numpy(np.concatenate((e.source, e.target))).to(device)) for e in examples]
    vae = train_vae(config.vae, rows, options.vae_steps, options.vae_batch, device, options.vae_seconds, say)
    torch.save(vae.state_dict(), out / "vae.pt")
    data, scale, shift = prepare(vae, examples, device, 512)
    config = demo_config(scale, shift)
    say(f"latents encoded: scale {scale:.4f}, shift {shift:.4f}")

    bagel = new_bagel(config, device, GRID)
    say(f"{sum(p.numel() for p in bagel.parameters()) / 1e6:.2f} M parameters")
    sizes = BatchSizes()
    if options.batch_divisor > 1:
        sizes = BatchSizes(
            *(tuple(max(1, n // options.batch_divisor) for n in part) for part in (sizes.draw, sizes.edit, sizes.ask))
        )
    trainer = Trainer(bagel, data, special, sizes)
    trainer.warm_up()
    say("training step ready")
    steps = trainer.train(options.steps, options.seconds, say)
    trainer.use_average()
    say(f"{steps} steps done")

    write_configs(config, out, special)
    export_checkpoint(bagel, vae, config, out)
    say("exported")
    record = {"steps": steps, "seconds": round(time.monotonic() - started, 1), "measured": []}
    for example in examples:
        sampler = Sampler(bagel, vae, scale, shift, tokenizer, special, example.canvas)
        result = quick_measure(sampler, options.measure, 12345, options.timesteps)
        _contact_sheet(result.pop("pictures"), out / f"look_{example.canvas.height}x{example.canvas.width}.png")
        record["measured"].append({"canvas": [example.canvas.height, example.canvas.width], **result})
        say(", ".join(f"{k} {v}" for k, v in result.items() if isinstance(v, int)))
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    say("done")


def _contact_sheet(pictures: tuple[np.ndarray, np.ndarray], path: Path) -> None:
    from PIL import Image

    shown = [p for batch in pictures for p in batch[:32]]
    height, width = shown[0].shape[:2]
    sheet = Image.new("RGB", (16 * (width + 4), -(-len(shown) // 16) * (height + 4)))
    for i, picture in enumerate(shown):
        sheet.paste(Image.fromarray(picture), ((i % 16) * (width + 4), (i // 16) * (height + 4)))
    sheet.save(path)


if __name__ == "__main__":
    main()

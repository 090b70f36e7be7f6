"""The training's tasks: contexts as they are declared, frames that see each other, and losses that can fall."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowmem_bagel.benchmarks.demo import data, export, forward, layout, mixture, sampler, tokens, train
from lowmem_bagel.benchmarks.demo.clip_cases import measure
from lowmem_bagel.benchmarks.demo.draw import Canvas
from support.numeric import relative_l2
from tokenizers import Tokenizer

from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.model.vae import Vae

CPU = torch.device("cpu")
TOKENIZER = FOLDER / "tokenizer.json"
SPECIAL = tokens.special_ids(Tokenizer.from_file(str(TOKENIZER)))
NEW = [name for name in mixture.TASKS if name not in mixture.STILLS]


@pytest.fixture(scope="module")
def examples() -> list[data.Examples]:
    return data.make_examples({"scenes": 3, "clips": 2, "views": 2}, TOKENIZER, 1, 1)


@pytest.fixture(scope="module")
def encoded(examples: list[data.Examples]) -> list[train.Encoded]:
    vae = Vae(layout.demo_config().vae).requires_grad_(False)
    return train.prepare(vae, examples, mixture.TASKS, CPU, 16)[0]


@pytest.fixture(scope="module")
def shipped() -> sampler.Sampler:
    bagel, vae, config = export.load_checkpoint(FOLDER, CPU)
    scale, shift = config.vae.scale_factor, config.vae.shift_factor
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    return sampler.Sampler(bagel, vae, scale, shift, tokenizer, SPECIAL, Canvas(128, 128))


def one_layer() -> BagelConfig:
    whole = layout.demo_config()
    return replace(whole, decoder=replace(whole.decoder, num_layers=1), vit=replace(whole.vit, num_layers=1))


def lesson(name: str, encoded: list[train.Encoded], batch: int, **change: object) -> train.Lesson:
    task = replace(mixture.TASKS[name], **change)  # type: ignore[arg-type]
    return train.Lesson(name, task, next(d for d in encoded if d.kind == task.kind), batch, SPECIAL)


def taught(made: train.Lesson) -> train.Taught:
    bagel = forward.new_bagel(layout.demo_config(), CPU, layout.GRID)
    embed, chosen = forward.Embedder(bagel, SPECIAL, 8, 8), made.choose()
    return made.teach(embed, chosen, [embed.pictures(patches) for patches in made.shown(chosen)])


def test_frames_of_a_split_have_positions_of_their_own_and_see_each_other() -> None:
    shape = forward.Shape(
        forward.Block("latent", 1), forward.Block("text", 3), *[forward.Block("latent", 1, noisy=True)] * 2
    )
    positions, mask = shape.place(torch.tensor([[1, 2, 1, 1]]))
    # und: markers, text, markers, markers; then gen: the three latents.
    assert positions[0].tolist() == [0, 0, 1, 2, 3, 3, 3, 4, 4, 0, 3, 4]
    seen = {row: [at for at in range(12) if mask[0, 0, row, at] == 0] for row in (0, 3, 7, 10, 11)}
    frames = [5, 6, 7, 8, 10, 11]
    everything = [0, 1, 2, 3, *frames[:4], 9, 10, 11]
    assert seen[0] == [0, 1, 9]
    assert seen[3] == [0, 1, 2, 3, 9]
    assert seen[7] == seen[10] == seen[11] == everything


def test_every_context_is_a_multiple_of_8_tokens_and_every_name_exists(examples: list[data.Examples]) -> None:
    for name, task in mixture.TASKS.items():
        assert len(task.batch) == len(data.KINDS[task.kind].canvases), name
        for made in (e for e in examples if e.kind == task.kind):
            shape = task.shape(made.canvas.height * made.canvas.width // 256)
            assert (shape.und_tokens + shape.gen_tokens) % 8 == 0, name
            assert set(task.names("said", "spoken", "asking")) <= set(made.texts)
            assert set(task.names("seen", "looked at", "drawn")) <= set(made.pictures)
        names = {name for slot in task.slots for name in (slot.name, f"{slot.role} {slot.name}")}
        assert len({(slot.role, slot.name) for slot in task.slots}) == len(task.slots)
        for choice in task.choices:
            assert 0 < sum(share for share, _ in choice) <= 1
            assert all(set(left_out) <= names for _, left_out in choice)


def test_parts_are_left_out_as_often_as_declared(encoded: list[train.Encoded]) -> None:
    torch.manual_seed(0)
    made = lesson("clip", encoded, 1)
    there = made._there(20_000).float().mean(0)
    names = [slot.name for slot in made.task.slots]
    shares = dict(zip(names, there.tolist(), strict=True))
    assert abs(shares["captions"] - 0.88) < 0.01
    assert shares["frame0"] == 1
    assert abs(shares["frame1"] - 0.94) < 0.01
    assert abs(shares["frame4"] - (1 - 0.06 - 0.14 - 0.15 - 0.25)) < 0.015
    assert set(made._there(200)[:, 2:].diff(dim=1).unique().tolist()) <= {0, -1}, "a frame after one that is left out"


def test_one_frame_is_drawn_after_all_those_before_it(encoded: list[train.Encoded]) -> None:
    made = lesson("follow", encoded, 1)
    seen = [slot.role == "seen" for slot in made.task.slots]
    for there in made._there(300).tolist():
        stays = [(slot.role, slot.name) for slot, kept in zip(made.task.slots, there, strict=True) if kept]
        (drawn,) = (int(name[-1]) for role, name in stays if role == "drawn")
        before = [int(name[-1]) for role, name in stays if role == "seen"]
        assert before in (list(range(drawn)), list(range(3, drawn)))
    assert sum(seen) == 6


def test_a_frame_that_is_left_out_teaches_nothing(encoded: list[train.Encoded]) -> None:
    part = taught(lesson("clip", encoded, 2, choices=(((1.0, ("frame2", "frame3", "frame4")),),)))
    assert part.drawn.sum(1).tolist() == [128, 128]
    assert part.drawn[:, :128].all()
    hidden = forward.run_groups(forward.new_bagel(layout.demo_config(), CPU, layout.GRID), [part.group])
    assert hidden[0][1].isfinite().all()


def test_a_picture_is_asked_for_by_vision_start(encoded: list[train.Encoded]) -> None:
    part = taught(lesson("converse", encoded, 3))
    ask, end = SPECIAL["<|vision_start|>"], SPECIAL["<|im_end|>"]
    plan, reply = part.labels.split(data.ANSWER_TOKENS - 1, dim=1)
    assert (plan == ask).sum(1).tolist() == [1, 1, 1]
    assert (reply == end).sum(1).tolist() == [1, 1, 1]
    assert not (plan == end).any()
    assert not (reply == ask).any()
    assert part.spoken[0] == data.REQUEST_TOKENS
    assert len(part.spoken) == part.labels.shape[1]


def test_every_task_is_learnt_by_heart(encoded: list[train.Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(train, "random_times", lambda count, device: torch.full((count,), 0.9, device=device))
    tasks = {name: replace(mixture.TASKS[name].scaled(0), weight=1.0) for name in NEW}
    trainer = train.Trainer(forward.new_bagel(one_layer(), CPU, layout.GRID), encoded, SPECIAL, tasks)
    seen = []
    for _ in range(3):
        trainer.muon_lr.fill_(4e-3)
        trainer.adam_lr.fill_(4e-3)
        torch.manual_seed(2)  # the same examples, times and noise again
        trainer._step()
        seen.append(trainer.losses.clone())
    assert (seen[-1] < 0.98 * seen[0]).all(), (seen[0], seen[-1])


def test_frames_are_drawn_together(shipped: sampler.Sampler) -> None:
    """One frame is the picture; of two, each sees the other; and a text does not see another's."""
    texts = ["a red circle moves up", "a blue square on white"]
    one = shipped.frames([texts], None, 1, 3, 3)
    assert torch.equal(one[:, 0], shipped.draw(texts, 3, 3))
    two = shipped.frames([texts], None, 2, 3, 3)
    again = shipped.frames([[texts[0], "something longer that is quite another on black"]], None, 2, 3, 3)
    assert relative_l2(again[0], two[0]) < 1e-5
    assert relative_l2(again[1], two[1]) > 1e-2
    plain = shipped.frames([texts], None, 2, 3, 3, guided=False)
    assert 1e-2 < relative_l2(plain, two) < 1
    tokens_of, x = 64, torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(0))
    changed = torch.cat((x[:, :64], x[:, 64:] + 1), dim=1)
    velocities = []
    for noisy in (x, changed):
        ids = shipped.ids(texts[:1], 12)
        shape = forward.Shape(forward.Block("text", 12), *[forward.Block("latent", 64, noisy=True)] * 2)
        lengths = torch.tensor([[int(forward.text_lengths(ids, shipped.pad)), 1, 1]])
        drawn = [(frame, torch.full((1,), 0.9)) for frame in noisy.split(tokens_of, dim=1)]
        with torch.no_grad():
            group = forward.assemble(shipped.embed, shape, (ids, *drawn), lengths)
            velocities.append(shipped.velocities([group], frames=2)[0])
    assert relative_l2(velocities[1][:, :64], velocities[0][:, :64]) > 1e-4


@pytest.mark.parametrize("name", ["future", "views"])
def test_the_trainers_forward_paints_cases(shipped: sampler.Sampler, name: str) -> None:
    found = measure(name, lambda *asked: shipped.paint(*asked, timesteps=2), 1, 5)
    frames = {"future": 4, "views": 2}[name]
    assert [picture.shape for picture in found["pictures"][0]] == [(128, 128, 3)] * frames
    assert found["total"] == 1


def test_conversations_are_measured(shipped: sampler.Sampler) -> None:
    """Both drawn from request and plan, and read word by word."""
    found = sampler.measure_conversations(shipped, 2, 5, 2)
    assert 0 <= found["plans_right"] <= found["total"] == 2
    assert [len(drawn) for drawn in found["pictures"]] == [1, 1]


def test_a_mixture_names_tasks_and_shares() -> None:
    assert mixture.mixture("ask=0.5,clip") == {"ask": 0.5, "clip": 1.0}
    assert mixture.TASKS["draw"].scaled(0.001).batch == (1, 1, 1)
    assert mixture.TASKS["draw"].scaled(0.5).batch == (256, 28, 28)
    with pytest.raises(ValueError, match="no task 'dance'; there are draw, "):
        mixture.mixture("dance=1")
    with pytest.raises(ValueError, match="add draw and ask"):
        mixture.mixture("clip=1,future=1")


def test_a_task_that_weighs_twice_as_much_counts_so_in_the_loss(encoded: list[train.Encoded]) -> None:
    bagel = forward.new_bagel(layout.demo_config(), CPU, layout.GRID)
    few = {name: mixture.TASKS[name].scaled(0.01) for name in ("draw", "ask")}
    factors = mixture.shares("draw=2")
    tasks = {name: task.weighted(factors.get(name, 1)) for name, task in few.items()}
    trainer = train.Trainer(bagel, [d for d in encoded if d.kind == "scenes"], SPECIAL, tasks)
    loss = trainer.loss().item()
    draw, ask = trainer.losses.tolist()
    assert loss == pytest.approx(2 * draw + ask, rel=1e-5)


def test_training_goes_on_from_an_exported_checkpoint(tmp_path: Path) -> None:
    """`make --resume` to its end, on next to nothing: new tasks beside an old one, in wider layers, exported and
    measured."""
    import json

    from lowmem_bagel.benchmarks.demo.make import make, options

    before = tmp_path / "before"
    before.mkdir()
    shallow = one_layer()
    export.export_checkpoint(forward.new_bagel(shallow, CPU, layout.GRID), Vae(shallow.vae), shallow, before)
    layout.write_configs(shallow, before, SPECIAL)
    tokens.write_tokenizer(Tokenizer.from_file(str(TOKENIZER)), before)
    told = "--mixture ask=0.01,clip=0.01 --examples 6 --clips 2 --workers 1 --until 0 --measure 1 --timesteps 2"
    told += " --intermediate-size 640 --weights ask=2"
    make(options([str(tmp_path), "--resume", str(before), *told.split()]))
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 1
    assert record["clip"]["total"] == 1
    assert record["128x128"]["count"] == 1
    assert (tmp_path / "look_clip.png").exists()
    bagel, vae, config = export.load_checkpoint(tmp_path, CPU)
    assert config == replace(shallow, decoder=replace(shallow.decoder, intermediate_size=640))
    weights = sum(parameter.numel() for part in (bagel, vae) for parameter in part.parameters())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 2.1 * weights
    assert all(parameter.isfinite().all() for parameter in bagel.parameters())

"""One complete checkpoint of a repository: which weights are taken, what is left, and what the base completes."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from support.hub_server import COMMIT, HubServer
from typer.testing import CliRunner

from lowmem_bagel.checkpoint.weight_sets import USUAL
from lowmem_bagel.checkpoint.weights import choose
from lowmem_bagel.cli.download import download_command
from lowmem_bagel.demo_checkpoint import FOLDER as DEMO
from lowmem_bagel.errors import CheckpointError, DownloadError
from lowmem_bagel.hub.download import BAGEL_REPO, DownloadResult, Patience, download, spec_of
from lowmem_bagel.hub.known import KNOWN

HASTY = Patience(timeout=5.0, attempts=2, pause=0.01)
EMA, EMA_BF16, MODEL, MODEL_BF16 = USUAL
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
CONFIGS = {"llm_config.json": b'{"own": "llm"}', "vit_config.json": b'{"own": "vit"}'}
TOKENIZER = {"tokenizer.json": b'{"own": 1}', "tokenizer_config.json": b"{}"}
VAE = {"ae.safetensors": b"own vae"}
AROUND = {**CONFIGS, **TOKENIZER, **VAE}
BASE_AROUND = {
    **{name: b'{"base": "%s"}' % name.encode() for name in (*CONFIGS, *TOKENIZER, "vocab.json")},
    "merges.txt": b"a b",
    "ae.safetensors": b"base vae",
    "config.json": b"{}",
    EMA: b"base weights",
}


def stored(*names: str) -> bytes:
    """A safetensors file of tensors of these names."""
    head = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)})
    return struct.pack("<Q", len(head)) + head.encode() + bytes(len(names))


OURS = stored("language_model.model.layers.0.mlp_moe_gen.gate_proj.weight")
OURS_TOO = stored("vae2llm.weight")
THEIRS = stored("transformer.h.0.attn.weight")


def index(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{number}": file for number, file in enumerate(files)}}).encode()


pytestmark = pytest.mark.usefixtures("plain_environment")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({}, others={BAGEL_REPO: dict(BASE_AROUND)}) as server:
        yield server


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path) -> Callable[..., DownloadResult]:
    def fetch(files: dict[str, bytes], repo: str = hub.repo, **settings: Any) -> DownloadResult:
        hub.files = files
        return download(repo, tmp_path / "out", endpoint=hub.endpoint, patience=HASTY, **settings)

    return fetch


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(*names: str) -> dict[str, bytes]:
    """Files of BAGEL's tensors, each of others."""
    return {name: stored(f"language_model.model.layers.0.mlp_moe_gen.{name}") for name in names}


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ([EMA, MODEL], [EMA]),
        ([MODEL_BF16, EMA_BF16], [EMA_BF16]),
        ([MODEL_BF16, MODEL], [MODEL]),
        ([MODEL_BF16], [MODEL_BF16]),
        ([MODEL, *SHARDS], [MODEL]),
        (SHARDS, SHARDS),
        (["ema-FP8.safetensors"], ["ema-FP8.safetensors"]),
        (["unusual.safetensors", "optimizer.safetensors"], ["unusual.safetensors"]),
        ([EMA, "adapter_model.safetensors"], [EMA]),
        ([MODEL, "._model.safetensors"], [MODEL]),
    ],
)
def test_one_set_is_taken_in_the_order_of_reading_and_the_others_are_named(
    there: list[str], taken: list[str], fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    training = {"optimizer.00000-of-00008.pt": b"pickle", "scheduler.pt": b"pickle", "pytorch_model.bin": b"pickle"}
    files = {**AROUND, **weights(*there), **training, "README.md": b"", "figure.png": b""}
    result = fetch(files)
    assert contents(tmp_path / "out") == {**AROUND, **weights(*taken)}
    assert list(result.weights) == taken
    assert set(result.left) == {*there, *training} - {*taken}
    assert (result.completed, result.base) == ((), "")


@pytest.mark.parametrize("copied", [INDEX, "ema.safetensors.index.json"])
def test_an_index_is_followed_where_its_files_are_there(
    copied: str, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    indexed = {copied: index(*SHARDS), **weights(*SHARDS, "other.safetensors")}
    result = fetch({**AROUND, **indexed})
    del indexed["other.safetensors"]
    assert contents(tmp_path / "out") == {**AROUND, **indexed}
    assert (set(result.weights), result.left) == ({*SHARDS}, ("other.safetensors",))


BROKEN = [index("../x.safetensors"), b"{}", b"[]", b"\xff", b'{"weight_map": 1}', b"[" * 99_999]


@pytest.mark.parametrize("text", [index(*SHARDS), index(*SHARDS, MODEL), *BROKEN])
def test_a_stale_index_is_not_believed_over_the_files(
    text: bytes, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    fetch({**AROUND, INDEX: text, **weights(MODEL)})
    assert contents(tmp_path / "out") == {**AROUND, **weights(MODEL)}
    assert not hub.transfers(INDEX), "nobody needs to know what it says"


def test_an_index_decides_where_no_name_does(fetch: Callable[..., DownloadResult], tmp_path: Path) -> None:
    fetch({**AROUND, INDEX: index(*SHARDS), **weights("unusual.safetensors")})
    assert contents(tmp_path / "out") == {**AROUND, **weights("unusual.safetensors")}
    shutil.rmtree(tmp_path / "out")
    for text, message in [
        (index(*SHARDS), f"{SHARDS[1]} is missing, which {INDEX} names"),
        *((text, INDEX) for text in BROKEN),
    ]:
        with pytest.raises(DownloadError, match=message):
            fetch({**AROUND, INDEX: text, **weights(SHARDS[0])})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (MODEL, [MODEL]),
        (INDEX, [INDEX, *SHARDS]),
        (SHARDS[1], [INDEX, *SHARDS]),
        ("nested/ema.safetensors", [EMA]),
    ],
)
def test_other_weights_are_taken_by_name(
    asked: str, taken: list[str], fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    there = {INDEX: index(*SHARDS), **weights(EMA, MODEL, *SHARDS), "nested/ema.safetensors": b"nested"}
    fetch({**AROUND, **there}, weights=asked)
    nested = {EMA: b"nested"} if "/" in asked else {}
    assert contents(tmp_path / "out") == {**AROUND, **{name: there[name] for name in taken}, **nested}


LAYOUTS: list[dict[str, bytes]] = [
    weights(EMA, MODEL),
    weights(MODEL_BF16, "z.safetensors"),
    {INDEX: index(*SHARDS), **weights(*SHARDS)},
    {INDEX: index(*SHARDS), **weights(MODEL)},
    {INDEX: index(*SHARDS), **weights("a.safetensors")},
    {INDEX: index(*SHARDS), **weights(*SHARDS[:2])},
    {INDEX: b"{}", **weights("a.safetensors")},
    {
        "tuned.safetensors.index.json": index("a.safetensors", "b.safetensors"),
        **weights("a.safetensors", "b.safetensors"),
    },
    weights(*SHARDS),
    weights(*SHARDS[1:]),
    weights("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    weights("a.safetensors", "b.safetensors"),
    {"a.safetensors": OURS, "b.safetensors": OURS},
    {"a.safetensors": OURS, "b.safetensors": THEIRS},
    {"a.safetensors": OURS, "b.safetensors": stored("x.lora_A.weight")},
    {"a.safetensors": OURS, "b.safetensors": b"<html>"},
    {"a.safetensors": b"<html>"},
    {"optimizer.safetensors": OURS, "ema-FP8.safetensors": OURS, "._ema.safetensors": OURS},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(layout))
def test_a_repository_is_read_as_the_folder_that_holds_the_same(
    layout: dict[str, bytes], fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    folder = tmp_path / "same"
    folder.mkdir()
    for name, data in layout.items():
        (folder / name).write_bytes(data)
    try:
        expected = {path.name for path in choose(folder).chosen.files}
    except CheckpointError:
        with pytest.raises(DownloadError):
            fetch({**AROUND, **layout})
    else:
        assert {*fetch({**AROUND, **layout}).weights} == expected
        assert {path.name for path in choose(tmp_path / "out").chosen.files} == expected


def test_weights_that_are_not_there_are_refused_with_those_that_are(fetch: Callable[..., DownloadResult]) -> None:
    with pytest.raises(DownloadError, match=f"no weights 'x.safetensors'; it has {EMA}, {MODEL}"):
        fetch({**AROUND, **weights(EMA, MODEL)}, weights="x.safetensors")


def test_several_sets_of_unusual_names_are_told_apart_by_their_tensors(
    fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    fetch({**AROUND, "a.safetensors": OURS, "b.safetensors": OURS_TOO})
    assert contents(tmp_path / "out") == {**AROUND, "a.safetensors": OURS, "b.safetensors": OURS_TOO}
    shutil.rmtree(tmp_path / "out")
    result = fetch({**AROUND, "a.safetensors": THEIRS, "b.safetensors": OURS})
    assert (result.weights, result.left) == (("b.safetensors",), ("a.safetensors",))
    shutil.rmtree(tmp_path / "out")
    shared = "mlp_moe_gen.gate_proj.weight is in a.safetensors and in b.safetensors"
    with pytest.raises(DownloadError, match=f"{shared}; it has a.safetensors, b.safetensors: .*--weights FILE"):
        fetch({**AROUND, "a.safetensors": OURS, "b.safetensors": OURS})
    assert not (tmp_path / "out").exists()


def test_shards_have_to_be_all_there(fetch: Callable[..., DownloadResult], tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"^owner/model: {SHARDS[2]} is missing"):
        fetch({**AROUND, **weights(*SHARDS[:2])})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize(
    ("own", "completed"),
    [
        ({}, {"llm_config.json", "vit_config.json", *TOKENIZER, "vocab.json", "merges.txt", "ae.safetensors"}),
        (CONFIGS, {*TOKENIZER, "vocab.json", "merges.txt", "ae.safetensors"}),
        ({**CONFIGS, **TOKENIZER}, {"ae.safetensors"}),
        ({**TOKENIZER, "llm_config.json": b"{}"}, {"vit_config.json", "ae.safetensors"}),
        ({**CONFIGS, **VAE, "vocab.json": b"{}", "merges.txt": b"c d"}, {"tokenizer_config.json"}),
        ({**CONFIGS, **TOKENIZER, "vae/ae.safetensors": b"v"}, set()),
        ({**TOKENIZER, **VAE, "config.json": b'{"llm_config": {"a": 1}, "vit_config": {"b": 1}}'}, set()),
        ({**TOKENIZER, **VAE, "config.json": b'{"llm_config": {"a": 1}}'}, {"vit_config.json"}),
        ({**TOKENIZER, **VAE, "config.json": b"{}"}, {"llm_config.json", "vit_config.json"}),
    ],
)
def test_what_a_repository_lacks_comes_from_the_base(
    own: dict[str, bytes], completed: set[str], source: str, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    result = fetch({**own, MODEL: OURS}, source=source)
    assert contents(tmp_path / "out") == {**own, MODEL: OURS, **{name: BASE_AROUND[name] for name in completed}}
    assert set(result.completed) == completed
    assert result.base == (BAGEL_REPO if completed else "")
    assert not (tmp_path / "out" / ".download").exists()
    assert fetch({**own, MODEL: OURS}, source=source).received == 0


def test_the_base_may_be_another_repository_a_folder_or_none(
    hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.others["some/base"] = {**BASE_AROUND, "ae.safetensors": b"another vae"}
    own = {**CONFIGS, **TOKENIZER, MODEL: OURS}
    result = fetch(own, base="some/base")
    assert contents(tmp_path / "out") == {**own, "ae.safetensors": b"another vae"}
    assert (result.base, result.completed) == ("some/base", ("ae.safetensors",))

    folder = tmp_path / "base"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"vae of a folder")
    (folder / "vae" / "config.json").write_bytes(b"{}")
    shutil.rmtree(tmp_path / "out")
    result = fetch(own, base=folder)
    vae = {"vae/diffusion_pytorch_model.safetensors": b"vae of a folder", "vae/config.json": b"{}"}
    assert contents(tmp_path / "out") == {**own, **vae}
    assert {file.name for file in result.files if file.action == "copied"} == {*vae}
    again = fetch(own, base=folder)
    assert {file.action for file in again.files} == {"present"}

    shutil.rmtree(tmp_path / "out")
    asked = len(hub.log)
    assert fetch(own, base="none").completed == ()
    assert contents(tmp_path / "out") == own
    assert not any(BAGEL_REPO in request.path for request in hub.log[asked:])


def test_a_copy_that_fails_leaves_nothing(
    fetch: Callable[..., DownloadResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "ae.safetensors").write_bytes(b"vae")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DownloadError, match=r"ae.safetensors: the disk is full"):
        fetch({**CONFIGS, **TOKENIZER, MODEL: OURS}, base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("absent/base", r"lacks ae.safetensors: .*no public repository absent/base.*; or give --base FOLDER"),
        ("poor/base", r"lacks ae.safetensors: poor/base has no ae.safetensors either"),
        ("not a base", r"--base 'not a base' is no folder and no repository"),
        ("", r"--base '' is no folder and no repository"),
    ],
)
def test_a_base_that_does_not_help(
    base: str, message: str, hub: HubServer, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    hub.others["poor/base"] = dict(CONFIGS)
    with pytest.raises(DownloadError, match=message):
        fetch({**CONFIGS, **TOKENIZER, MODEL: OURS}, base=base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DownloadError, match=r"empty has no ae.safetensors either"):
        fetch({**CONFIGS, **TOKENIZER, MODEL: OURS}, base=tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_the_disk_has_to_hold_what_the_base_adds(
    fetch: Callable[..., DownloadResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem_bagel.hub.download import DISK_MARGIN

    need = len(OURS) + len(BASE_AROUND["ae.safetensors"]) + sum(map(len, {**CONFIGS, **TOKENIZER}.values()))
    free = [need + DISK_MARGIN - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    with pytest.raises(DownloadError, match="free some space"):
        fetch({**CONFIGS, **TOKENIZER, MODEL: OURS})
    assert not (tmp_path / "out").exists()
    free[0] += 1
    fetch({**CONFIGS, **TOKENIZER, MODEL: OURS})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({MODEL: THEIRS}, r"is not a BAGEL checkpoint: model.safetensors holds tensors such as 'transformer.h.0"),
        ({"a.safetensors": THEIRS}, "is not a BAGEL checkpoint: a.safetensors holds tensors"),
        ({"a.safetensors": THEIRS, "b.safetensors": THEIRS}, "holds several sets of weights; it has a.safetensors, b"),
        ({"a.safetensors": stored("base_model.x.lora_A.weight")}, r"holds an adapter \(a.safetensors\) and no model"),
        ({MODEL: OURS, "config.json": b"not JSON"}, "config.json is no JSON object"),
        ({MODEL: b"<html>"}, "model.safetensors is no safetensors file"),
        ({MODEL: b"\x05\0\0\0\0\0\0\0[[[[["}, "model.safetensors is no safetensors file"),
        ({MODEL: b"\xff" * 9000}, "model.safetensors is no safetensors file"),
        ({MODEL: stored()}, "holds no tensors"),
        (
            {"adapter_model.safetensors": b"", "adapter_config.json": b"{}"},
            r"holds an adapter \(adapter_model.safetensors\) and no model; fetch it by name",
        ),
        ({"model-Q4_K.gguf": b"GGUF"}, r"holds GGUF files \(model-Q4_K.gguf\)"),
        ({"__0_0.distcp": b"", ".metadata": b""}, r"its weights are pickles \(__0_0.distcp\)"),
        ({"ae.safetensors": b"", **CONFIGS}, "lacks safetensors files"),
        ({}, "lacks safetensors files"),
        ({"a/ema.safetensors": b"", "b/ema.safetensors": b""}, "holds weights in a, b; choose one: owner/model/a"),
    ],
)
def test_what_is_no_checkpoint_is_named(
    files: dict[str, bytes], message: str, fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    with pytest.raises(DownloadError, match=message):
        fetch(files)
    assert not (tmp_path / "out").exists()


def test_a_variant_is_fetched_whole(fetch: Callable[..., DownloadResult], tmp_path: Path) -> None:
    """Also one that is a GGUF file and its manifest alone."""
    files = {"variant.json": b"{}", "bagel-Q4_K.gguf": b"GGUF"}
    fetch(files | {"README.md": b""}, base="none")
    assert contents(tmp_path / "out") == files


STAGES = {
    "results/stage_1_align/0030000/ema.safetensors": b"one",
    "results/stage_1_align/0030000/optimizer.00000-of-00008.pt": b"",
    "results/stage_2_reason/0010000/ema.safetensors": b"two",
    "results/stage_2_reason/0010000/model.safetensors": b"two too",
    "results/stage_2_reason/vit_config.json": b"of the stage",
    "assets/figure.png": b"",
}


@pytest.mark.parametrize(
    ("repo", "settings"),
    [
        ("owner/model/results/stage_2_reason/0010000", {}),
        ("owner/model/results/stage_2_reason/", {}),
        ("owner/model/stage_2_reason@main", {}),
        ("owner/model/stage_2", {}),
        ("owner/model", {"subfolder": "/results/stage_2_reason/"}),
        ("owner/model", {"weights": "results/stage_2_reason/0010000/ema.safetensors"}),
        ("https://huggingface.co/owner/model/blob/main/results/stage_2_reason/0010000/ema.safetensors", {}),
    ],
)
def test_a_folder_of_a_repository(
    repo: str, settings: dict[str, str], fetch: Callable[..., DownloadResult], tmp_path: Path
) -> None:
    result = fetch({**STAGES, **AROUND}, repo, **settings)
    assert contents(tmp_path / "out") == {**AROUND, "vit_config.json": b"of the stage", EMA: b"two"}
    assert set(result.left) == {name for name in STAGES if name.endswith((".pt", "s"))} - {
        "results/stage_2_reason/0010000/ema.safetensors"
    }


def test_the_only_folder_with_weights_is_taken(fetch: Callable[..., DownloadResult], tmp_path: Path) -> None:
    fetch({**AROUND, "ckpt/model.safetensors": b"here", "vae/diffusion_pytorch_model.safetensors": b"no model"})
    assert contents(tmp_path / "out") == {**AROUND, MODEL: b"here"}


def test_a_folder_that_is_not_there(fetch: Callable[..., DownloadResult]) -> None:
    with pytest.raises(DownloadError, match="has no folder 'stage_9'; weights are in results/stage_1_align/0030000, "):
        fetch(STAGES, "owner/model/stage_9")
    with pytest.raises(
        DownloadError, match="holds weights in results/stage_1_align/0030000, results/stage_2_reason/00"
    ):
        fetch(STAGES, "owner/model/results")


@pytest.mark.parametrize(
    ("asked", "repo", "revision", "folder", "name"),
    [
        ({"repo": "a/b"}, "a/b", None, "", "b"),
        ({"repo": "a/b@v1"}, "a/b", "v1", "", "b"),
        ({"repo": "a/b@refs/pr/4"}, "a/b", "refs/pr/4", "", "b"),
        ({"repo": "a/b/c/d@v1"}, "a/b", "v1", "c/d", "b-c-d"),
        ({"repo": "a/b", "revision": "v1", "subfolder": "c"}, "a/b", "v1", "c", "b-c"),
        ({"repo": "a/b@v1", "revision": "v1"}, "a/b", "v1", "", "b"),
        ({"repo": "a/b/c/ema.safetensors"}, "a/b", None, "c/ema.safetensors", "b-c"),
        ({"repo": "https://huggingface.co/a/b"}, "a/b", None, "", "b"),
        ({"repo": "https://hf.co/a/b/tree/main/c/d?x=1#y"}, "a/b", "main", "c/d", "b-c-d"),
        ({"repo": "https://huggingface.co/a/b/tree/refs%2Fpr%2F4"}, "a/b", "refs/pr/4", "", "b"),
        ({"repo": "http://huggingface.co/a/b/blob/v1/m.safetensors"}, "a/b", "v1", "m.safetensors", "b"),
        ({"repo": "https://www.modelscope.cn/models/a/b/files", "source": "modelscope"}, "a/b", None, "", "b"),
        ({"repo": "ReCA"}, "sanaka87/BAGEL-RecA", None, "", "BAGEL-RecA"),
        ({"repo": "reca@v1"}, "sanaka87/BAGEL-RecA", "v1", "", "BAGEL-RecA"),
        ({"repo": "sensenova-si", "source": "modelscope"}, "SenseNova/SenseNova-SI-1.1-BAGEL-7B-MoT", None, "",
         "SenseNova-SI-1.1-BAGEL-7B-MoT"),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_read(
    asked: dict[str, Any], repo: str, revision: str | None, folder: str, name: str
) -> None:
    spec = spec_of(**{"source": "huggingface", **asked})
    assert (spec.repo, spec.revision, spec.folder, spec.name) == (repo, revision, folder, name)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"repo": "a b/c"}, "is not a repository; write it as owner/name"),
        ({"repo": "a/b@"}, "is not a repository"),
        ({"repo": "a/b@v1", "revision": "v2"}, "'v1' and 'v2' are two revisions"),
        ({"repo": "a/b/c", "subfolder": "d"}, "'c' and 'd' are two folders"),
        ({"repo": "a/b/../c"}, "is not a folder of a repository"),
        ({"repo": "reca", "source": "modelscope"}, "sanaka87/BAGEL-RecA is not known to be at modelscope"),
        ({"repo": "https://huggingface.co/a"}, "is not a repository; write it as owner/name"),
        ({"repo": "https://example.org/a/b"}, "is not a repository; write it as owner/name"),
        ({"repo": "https://huggingface.co/a/b/tree/main/%2e%2e/c"}, "is not a folder of a repository"),
        ({"repo": "https://modelscope.cn/models/a/b"}, "is a page of modelscope; give --source modelscope"),
        ({"repo": "https://huggingface.co/a/b", "source": "modelscope"}, "is a page of huggingface; give --source hug"),
    ],
)
def test_what_cannot_be_asked_for(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(DownloadError, match=message):
        spec_of(**{"source": "huggingface", **asked})


def layout(form: str) -> Iterable[str]:
    return SHARDS if form == "shards" else [form]


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_model_is_described_and_its_layout_is_fetched_whole(
    name: str, hub: HubServer, tmp_path: Path
) -> None:
    known = KNOWN[name]
    spec = spec_of(name, "huggingface")
    assert name == name.lower() and "/" not in name
    assert spec.repo == known.repo and known.repo.count("/") == 1
    assert known.weights in (*USUAL, "shards")
    assert known.license in ("Apache-2.0", "not stated")
    assert 5 < len(known.use) < 90 and not known.use.endswith(".")
    assert not known.modelscope or spec_of(name, "modelscope").repo == known.modelscope
    files = {**({} if known.needs_base else AROUND), **dict.fromkeys(layout(known.weights), OURS)}
    start = f"{known.folder}/" if known.folder else ""
    if known.repo != BAGEL_REPO:
        hub.others[known.repo] = {f"{start}{file}": data for file, data in files.items()}
    else:
        files = BASE_AROUND
    result = download(name, tmp_path / "out", endpoint=hub.endpoint, patience=HASTY)
    assert bool(result.completed) == known.needs_base
    expected = {**BASE_AROUND, **files} if known.needs_base else dict(files)
    expected = {key: data for key, data in expected.items() if key in files or key not in (EMA, "config.json")}
    assert contents(tmp_path / "out") == expected


def test_repositories_of_known_models_are_different() -> None:
    assert len({known.place("huggingface") for known in KNOWN.values()}) == len(KNOWN)
    assert KNOWN["bagel"].repo == BAGEL_REPO


def test_a_fine_tune_of_the_demo_checkpoint_opens_after_its_download(hub: HubServer, tmp_path: Path) -> None:
    from lowmem_bagel.checkpoint.folder import ModelFolder

    demo = {path.name: path.read_bytes() for path in DEMO.iterdir() if path.suffix in (".json", ".txt", ".safetensors")}
    hub.others[BAGEL_REPO] = demo
    own = {name: data for name, data in demo.items() if name.startswith(("model", "ae_", "resize_"))}
    hub.files = {**own, "optimizer.pt": b"", "README.md": b""}
    download(hub.repo, tmp_path / "out", endpoint=hub.endpoint, patience=HASTY)
    opened = ModelFolder.open(tmp_path / "out")
    assert opened.stored.keys() == ModelFolder.open(DEMO).stored.keys()


app = typer.Typer()
app.command()(download_command)


def test_the_command_says_what_was_taken_completed_and_left(hub: HubServer, tmp_path: Path) -> None:
    hub.files = {**CONFIGS, **TOKENIZER, **weights(EMA, MODEL), **{f"optimizer{i}.pt": b"" for i in range(20)}}
    arguments = [hub.repo, str(tmp_path / "out"), "--endpoint", hub.endpoint, "--weights", MODEL]
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    assert f"6 files of owner/model at {COMMIT}" in run.stdout
    assert f"  weights: {MODEL}" in run.stdout
    assert f"  from {BAGEL_REPO}: ae.safetensors" in run.stdout
    assert f"  left there: {EMA}, optimizer0.pt, " in run.stdout
    assert "and 13 more; --weights" in run.stdout
    out = f"{tmp_path / 'out'}"
    assert f"inspect {out}\n" in run.stdout
    record = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--base", "none"]).stdout)
    assert (record["weights"], record["completed"], len(record["left"])) == ([MODEL], [], 21)
    assert record["lacking"] == ["ae.safetensors"]

    (tmp_path / "out" / EMA).write_bytes(b"read first")
    run = CliRunner().invoke(app, [*arguments, "--base", "none"], catch_exceptions=False)
    assert f"inspect {out} --weights {MODEL}\n" in run.stdout
    assert f"--model {out} --weights {MODEL}" in run.stdout
    assert "  lacking: ae.safetensors; --base FOLDER" in run.stdout


def test_the_command_lists_known_models() -> None:
    run = CliRunner().invoke(app, ["--list"], catch_exceptions=False)
    assert run.exit_code == 0
    lines = {line.split()[0]: line for line in run.stdout.splitlines()}
    assert lines.keys() == {"name", *KNOWN}
    assert "sanaka87/BAGEL-RecA" in lines["reca"] and "completed from the base" in lines["reca"]
    record = json.loads(CliRunner().invoke(app, ["--list", "--json"]).stdout)
    assert record["sensenova-vision"]["license"] == "Apache-2.0"

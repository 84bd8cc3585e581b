"""Weights that are damaged, describe what they do not hold, or carry code."""

import hashlib
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from mimlet.errors import WeightsError
from mimlet.models.build import encoder_of
from mimlet.models.decoders import make_decoder
from mimlet.models.shapes import HieraShape, HiViTShape, Shape, ViTShape
from mimlet.models.tokenizer import DiscreteVAE, VAEShape, open_tokenizer
from mimlet.models.weights import (
    encoder_state,
    load,
    load_classifier,
    load_decoder,
    load_encoder,
    load_encoder_weights,
    open_checkpoint,
    read_tensors,
)
from mimlet.train.checkpoint import Checkpoints, read_checked
from tests.fuzz.fuzz import CHANGES, EDITS, VALUES, Edit, Refused, attempt, changed, fuzzed, mutated

VIT = ViTShape(16, 8, 12, 2, 3, mlp_ratio=1.0)
SHAPES: dict[str, Shape] = {
    "vit": VIT,
    "beit": ViTShape(16, 8, 12, 2, 3, 1.0, position="none", relative="qv", layer_scale=0.1),
    "distilled": ViTShape(16, 8, 12, 1, 3, 1.0, distillation_token=True),
    "hiera": HieraShape(32, 8, 4, (1, 1, 1, 1), 1, 1.0),
    "hivit": HiViTShape(32, 8, 16, (1, 1, 1), 2, 1.0, position="learned"),
    "itpn": HiViTShape(
        32,
        8,
        16,
        (1, 1, 1),
        2,
        1.0,
        "fast",
        "learned",
        layer_scale=0.1,
        pyramid_dim=16,
        pyramid_depth=1,
        pyramid_hidden=16,
    ),
}
VAE = VAEShape(16, codes=8, dim=4, hidden=4, layers=2)


def stored(kind: str) -> dict[str, Any]:
    """What a file of ours stores beside the tensors."""
    return {"kind": "encoder", "shape": vars(SHAPES[kind]), "mean": [0.5] * 3, "std": [0.5] * 3}


def _states() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    states = {kind: encoder_state(encoder_of(shape)) for kind, shape in SHAPES.items()}
    states["classifier"] = states["vit"] | {"head.weight": torch.zeros(3, 12), "head.bias": torch.zeros(3)}
    decoder = make_decoder(encoder_of(VIT), 192, 12, 1, 3, "sincos")
    states["full"] = states["vit"] | {f"decoder_{name}": value for name, value in decoder.state_dict().items()}
    states["vae"] = DiscreteVAE(VAE).state_dict()
    return {kind: {name: value.contiguous().clone() for name, value in state.items()} for kind, state in states.items()}


STATES = _states()


def torch_bytes(value: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def ours(kind: str, info: object, state: dict[str, Tensor] | None = None) -> bytes:
    return save(STATES[kind] if state is None else state, metadata={"mimlet": json.dumps(info)})


OF = {kind: kind if kind in SHAPES else "vit" for kind in STATES}
FILES: dict[str, bytes] = {f"{kind}.safetensors": ours(kind, stored(OF[kind])) for kind in STATES if kind != "vae"} | {
    "classifier.safetensors": ours("classifier", stored("vit") | {"kind": "classifier", "classes": ["a", "b", "c"]}),
    "vae.safetensors": ours("vae", {"kind": "tokenizer", "method": "dvae", "shape": vars(VAE)}),
    "bare.safetensors": save(STATES["vit"]),
    **{f"{kind}.pth": torch_bytes({"model": state, "epoch": 3}) for kind, state in STATES.items()},
    "legacy.pth": torch_bytes({"state_dict": STATES["vit"]}, _use_new_zipfile_serialization=False),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def use(path: Path, allowed: Path | None = None) -> None:
    """Everything that is made from a weights file."""
    uses: tuple[Callable[[], object], ...] = (
        lambda: load_encoder(path, heads=0),
        lambda: load_encoder(path, heads=3, image_size=32),
        lambda: load_encoder_weights(encoder_of(VIT), path, keep_blocks=1),
        lambda: load(path),
        lambda: load_classifier(path),
        lambda: open_tokenizer(path),
        lambda: load_decoder(open_checkpoint(path), encoder_of(VIT), heads=3),
    )
    for each in uses:
        attempt(each, allowed=allowed)


@pytest.mark.parametrize("name", FILES)
def test_valid_files(name: str, place: Path) -> None:
    (place / name).write_bytes(FILES[name])
    if name.startswith("vae"):
        found = attempt(lambda: open_tokenizer(place / name))
        assert isinstance(found, Refused) == (name == "vae.pth")
    else:
        heads = {"hiera": 1, "hivit": 2, "itpn": 2}.get(name.split(".")[0], 3)
        found = attempt(lambda: load_encoder(place / name, heads=heads))
        assert not isinstance(found, Refused), found


@fuzzed(40)
@given(st.sampled_from([*FILES]), EDITS)
def test_mutated_files(place: Path, name: str, edits: list[Edit]) -> None:
    path = place / f"mutated{Path(name).suffix}"
    path.write_bytes(mutated(FILES[name], edits))
    attempt(lambda: read_tensors(path))
    use(path)


@fuzzed(30)
@given(st.sampled_from([name for name in FILES if name.endswith(".safetensors")]), EDITS)
def test_mutated_headers(place: Path, name: str, edits: list[Edit]) -> None:
    """Of safetensors: JSON with types, shapes and offsets, behind its length."""
    data = FILES[name]
    size = int.from_bytes(data[:8], "little")
    header = mutated(data[8 : 8 + size], edits)
    path = place / "header.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    use(path)


@fuzzed(30)
@given(st.sampled_from([name for name in FILES if name.endswith(".pth") and name != "legacy.pth"]), EDITS)
def test_mutated_pickles(place: Path, name: str, edits: list[Edit]) -> None:
    """Inside of a zip with good checksums."""
    path = place / "pickle.pth"
    with zipfile.ZipFile(io.BytesIO(FILES[name])) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            data = old.read(member)
            new.writestr(member, mutated(data, edits) if member.endswith("data.pkl") else data)
    use(path)


@fuzzed(40)
@given(st.sampled_from([*STATES]), CHANGES)
def test_other_descriptions(place: Path, kind: str, changes: list[tuple[int, str, Any]]) -> None:
    """In files whose tensors are whole."""
    info = stored(OF[kind]) if kind != "vae" else {"kind": "tokenizer", "shape": vars(VAE) | {}}
    path = place / "described.safetensors"
    path.write_bytes(ours(kind, changed(json.loads(json.dumps(info)), changes)))
    use(path)


@pytest.mark.parametrize("wrong", [{"pyramid_hidden": 0}, {"pyramid_dim": -1}, {"dim": 1, "heads": 1}])
def test_widths_of_nothing(place: Path, wrong: dict[str, int]) -> None:
    """Found at random: layers of zero channels."""
    info = stored(OF["itpn"])
    path = place / "nothing.safetensors"
    path.write_bytes(ours("itpn", {**info, "shape": {**info["shape"], **wrong}}))
    with pytest.raises(WeightsError, match="describes an encoder that cannot be"):
        load_encoder(path, heads=0)


SIZES = st.sampled_from((0, 1, 2, 3, 12, 16, 36, 1000))
TENSORS = st.lists(SIZES, max_size=4).filter(lambda shape: torch.Size(shape).numel() < 10**6).flatmap(
    lambda shape: st.sampled_from(
        (
            torch.zeros(shape),
            torch.full(shape, torch.nan),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
            torch.zeros(shape, dtype=torch.float16),
        )
    )
)  # fmt: skip
PARTS = ("norm1.weight", "attn.qkv.weight", "mlp.fc1.weight", "proj.weight", "reduction.weight", "attn.q_bias")
TABLE = "attn.relative_position_bias_table"
ODD_NAMES = st.sampled_from(
    (
        *(
            f"blocks.{number}.{part}"
            for number in ("0", "2", "999999", "9" * 30, "²", "-1")
            for part in (*PARTS, TABLE)
        ),
        *("decoder_blocks.7.norm1.weight", "decoder_pred.weight", "decoder_pos_embed", "mask_token", "head.weight"),
        *("fc_norm.weight", "head_dist.weight", "dist_token", "cls_token", "pos_embed", "patch_embed.proj.weight"),
        *("fpn_modules.0.norm2.weight", "rel_pos_bias.relative_position_bias_table", "norm.weight", "", "\x1b[2J"),
        *("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight", "encoder.down.99.x"),
        *("blocks.input.w", "blocks.output.conv.w", "blocks.group_1.block_9999999.id_path.w"),
    )
)


@fuzzed(40)
@given(
    st.sampled_from([*STATES]),
    st.lists(st.tuples(ODD_NAMES, TENSORS), max_size=4),
    st.lists(st.tuples(st.integers(0, 99), TENSORS | st.none()), max_size=3),
    st.booleans(),
)
def test_other_tensors(
    place: Path, kind: str, more: list[tuple[str, Tensor]], instead: list[tuple[int, Tensor | None]], told: bool
) -> None:
    """Whole files with other shapes, types and names than any model has."""
    state = dict(STATES[kind])
    for number, value in instead:
        name = [*state][number % len(state)]
        state.pop(name)
        if value is not None:
            state[name] = value
    state |= dict(more)
    path = place / ("odd.safetensors" if told else "odd.pth")
    path.write_bytes(ours(kind, stored(OF[kind]), state) if told else torch_bytes({"model": state}))
    use(path)


@fuzzed(30)
@given(VALUES | st.dictionaries(st.sampled_from(("model", "state_dict", "a")), VALUES, max_size=2))
def test_other_contents(place: Path, value: object) -> None:
    path = place / "contents.pth"
    path.write_bytes(torch_bytes(value))
    assert isinstance(attempt(lambda: read_tensors(path)), Refused)


# ---------------------------------------------------------------- what claims to be large


def with_shape(**numbers: object) -> bytes:
    return ours("vit", stored("vit") | {"shape": vars(VIT) | numbers})


def with_tensor(name: str, value: Tensor) -> bytes:
    return torch_bytes({"model": STATES["full"] | {name: value}})


def compressed(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    return stream.getvalue()


def many_names_for_one() -> bytes:
    """A thousand blocks that share their numbers."""
    block = {name: torch.zeros(1).expand(value.shape) for name, value in STATES["vit"].items()}
    wide = {f"blocks.{i}.mlp.fc1.weight": torch.zeros(1).expand(10**6, 12) for i in range(1000)}
    return torch_bytes({"model": block | wide})


BEYOND = b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
HUGE: dict[str, tuple[str, bytes]] = {
    "image_size": (".safetensors", with_shape(image_size=8_000_000)),
    "dim": (".safetensors", with_shape(dim=3_000_000)),
    "depth": (".safetensors", with_shape(depth=10**9)),
    "mlp_ratio": (".safetensors", with_shape(mlp_ratio=1e9)),
    "infinite": (".safetensors", with_shape(mlp_ratio=float("inf"))),
    "heads": (".safetensors", with_shape(heads=10**12)),
    "not a number": (".safetensors", with_shape(mlp_ratio=float("nan"))),
    "relative": (".safetensors", with_shape(relative="full", image_size=80_000, patch=1)),
    "vae": (".safetensors", ours("vae", {"kind": "tokenizer", "shape": vars(VAE) | {"codes": 10**9}})),
    "layers": (".safetensors", ours("vae", {"kind": "tokenizer", "shape": vars(VAE) | {"residual_blocks": 10**9}})),
    "wide": (".pth", with_tensor("patch_embed.proj.weight", torch.zeros(1).expand(10**6, 3, 8, 8))),
    "no numbers": (".pth", with_tensor("patch_embed.proj.weight", torch.zeros(10**9, 0, 8, 8))),
    "classes": (".pth", with_tensor("head.weight", torch.zeros(1).expand(10**9, 12))),
    "positions": (".pth", with_tensor("pos_embed", torch.zeros(1).expand(1, 10**12 + 1, 12))),
    "block": (".pth", with_tensor("blocks.999999.norm1.weight", torch.zeros(12))),
    "decoder block": (".pth", with_tensor("decoder_blocks.999999.norm1.weight", torch.zeros(12))),
    "decoder": (".pth", with_tensor("decoder_pred.weight", torch.zeros(192, 10**5).half())),
    "shared": (".pth", many_names_for_one()),
    "compressed": (".pth", compressed(torch_bytes({"model": {"x": torch.zeros(10**6)}}))),
    "header": (".safetensors", struct.pack("<Q", 2**63) + b"{}"),
    "nested": (".safetensors", save(STATES["vit"], metadata={"mimlet": "[" * 10**5})),
    "offsets": (".safetensors", struct.pack("<Q", len(BEYOND)) + BEYOND),
}


@pytest.mark.parametrize("what", HUGE)
def test_what_claims_to_be_huge_is_refused(what: str, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    suffix, data = HUGE[what]
    path = tmp_path / f"huge{suffix}"
    path.write_bytes(data)
    if what in ("vae", "layers"):
        assert isinstance(attempt(lambda: open_tokenizer(path)), Refused)
    elif what == "classes":
        assert isinstance(attempt(lambda: load_classifier(path, heads=3)), Refused)
    elif what.startswith("decoder"):
        encoder = encoder_of(VIT)
        assert isinstance(attempt(lambda: load_decoder(open_checkpoint(path), encoder, heads=3)), Refused)
    else:
        assert isinstance(attempt(lambda: load_encoder(path, heads=3)), Refused)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


# ---------------------------------------------------------------- code


class Touch:
    """What would make a file, if it were unpickled."""

    def __init__(self, path: Path, way: Callable[..., object] = os.system) -> None:
        self.path, self.way = path, way

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        text = f"touch {self.path}" if self.way is os.system else f"open({str(self.path)!r}, 'w')"
        return self.way, (text,)


def pickled_plain(value: object) -> bytes:
    return pickle.dumps(value)


def tarred(value: object) -> bytes:
    """torch's first format."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(value, 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def scripted(value: object) -> bytes:
    """A TorchScript archive with a pickle of ours in it."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), stream)
    out = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.namelist():
            new.writestr(member, pickle.dumps(value, 2) if member.endswith(".pkl") else old.read(member))
    return out.getvalue()


FORMS: dict[str, Callable[[object], bytes]] = {
    "zip": torch_bytes,
    "legacy": lambda value: torch_bytes(value, _use_new_zipfile_serialization=False),
    "pickle": pickled_plain,
    "tar": tarred,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", [os.system, eval, exec, __import__])
def test_no_code_is_run(form: str, way: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # torch makes a folder there before it refuses a tar
    canary, path, saved = tmp_path / "canary", tmp_path / "evil.pth", tmp_path / "step_00000001.pt"
    evil = Touch(canary, way)
    values: tuple[object, ...] = (
        evil,
        {"model": STATES["vit"], "args": evil},
        {"model": OrderedDict(STATES["vit"], **{"blocks.0.norm1.weight": evil})},
        {"model": {evil: torch.zeros(1)}},
    )
    for value in values:
        data = FORMS[form](value)
        for file in (path, saved):
            file.write_bytes(data)
        Path(f"{saved}.sha256").write_text(hashlib.sha256(data).hexdigest())
        use(path, tmp_path)
        for read in (lambda: load_encoder(path), lambda: read_checked(saved), Checkpoints(tmp_path, 1).latest):
            assert isinstance(attempt(read, allowed=tmp_path), Refused)
        assert not canary.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(scripted(Touch(tmp_path / "canary")))
    assert isinstance(attempt(lambda: load_encoder(tmp_path / "model.pt")), Refused)
    assert not (tmp_path / "canary").exists()

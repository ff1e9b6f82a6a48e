"""Make damaged models, and check that `load_encoder` opens or refuses each: no other error, no hang, no giant.

`python -m tests.models.damage COUNT SEED` tries that many with little memory to spend, and prints what became of them.
"""

import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastssl import load_encoder
from fastssl.cli import _is_for_the_user
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
}
#: Values that no setting has, or few.
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        7,
        1e-30,
        0.5,
        1e400,
        -(10**9),
        10**9,
        2**31,
        2**63,
        10**40,
        "",
        "x",
        "\x1b[31m\n",
        "../x",
    ),
    *([], [0], [1] * 5000, [[1]], {}, {"a": 1}, [None], "wavlm", "data2vec-audio", "best-rq", "integrate-and-fire"),
)
#: Slowest load that is accepted, in seconds; a good model takes a hundredth of this.
MOST_SECONDS = 20.0


def good_models(folder: Path) -> list[Path]:
    """Write one small model of each kind of file to a folder, and return their paths."""
    torch.manual_seed(0)
    convolutions: dict[str, Any] = {"conv_kernel": (10, 8), "conv_stride": (5, 8), "num_conv_pos_embeddings": 4}
    convolutions |= {"num_conv_pos_embedding_groups": 2}
    plain: SpeechEncoder = Encoder(EncoderConfig(**SHAPE, **convolutions))
    encoders: dict[str, SpeechEncoder] = {
        "plain": plain,
        "compressed": Encoder(EncoderConfig(**SHAPE, **convolutions, compressor="integrate-and-fire")),
        "conformer": ConformerEncoder(ConformerConfig(**SHAPE, conv_depthwise_kernel_size=3, num_mel_bins=8)),
    }
    for name, encoder in encoders.items():
        encoder.save_pretrained(folder / name)
    for name in ("pickled", "pickled of old", "in parts"):
        shutil.copytree(folder / "plain", folder / name)
        (folder / name / "model.safetensors").unlink()
    state = plain.state_dict()
    torch.save(state, folder / "pickled" / "pytorch_model.bin")
    old = folder / "pickled of old" / "pytorch_model.bin"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    parts = {f"pytorch_model-{part}-of-2.bin": dict(list(state.items())[part - 1 :: 2]) for part in (1, 2)}
    for name, part in parts.items():
        torch.save(part, folder / "in parts" / name)
    listed = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "in parts" / "pytorch_model.bin.index.json").write_text(json.dumps(listed))
    return sorted(path for path in folder.iterdir())


def damaged_models(good: Path, work: Path, *, count: int, seed: int) -> Iterator[tuple[str, Path]]:
    """Yield damaged copies of the models in a folder, each until the next one is made.

    Args:
        good: Folder that `good_models` wrote to.
        work: Folder for the copies; must not exist.
        count: Number of copies.
        seed: Seed of the damage; the copies with a seed are always the same.

    Yields:
        What was done, and the path of the copy.
    """
    models = sorted(good.iterdir())
    for index in range(count):
        draw = random.Random(f"{seed}/{index}")
        model = draw.choice(models)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(model, work)
        files = sorted(path for path in work.iterdir() if path.name != "README.md")
        done = []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            path = draw.choice(files)
            ways: list[Callable[[random.Random, Path], None]] = [_flip, _cut, _insert]
            if path.suffix == ".json":
                ways += [_change_json] * 6
            if path.suffix == ".safetensors":
                ways += [_change_header] * 3
            way = draw.choice(ways)
            try:
                way(draw, path)
            except ValueError:  # the file was damaged before
                way = _flip
                _flip(draw, path)
            done.append(f"{way.__name__} {path.name}")
        yield f"{seed}/{index} {model.name}: {', '.join(done)}", work


def outcome(path: Path) -> str:
    """Load a model, and return "loads" or the message of the error.

    Raises:
        AssertionError: The error is not one sentence for the user, or loading took too long.
    """
    begin = time.monotonic()
    try:
        load_encoder(path)
        message = "loads"
    except Exception as error:
        if not isinstance(error, ValueError) or not _is_for_the_user(error):
            raise AssertionError(f"not an error for the user: {type(error).__name__}: {error}") from error
        message = str(error)
    assert message.isprintable(), message
    assert len(message) < 2000, message
    seconds = time.monotonic() - begin
    assert seconds < MOST_SECONDS, f"took {seconds:.1f} s"
    return message


def _flip(draw: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(min(len(content), draw.choice((1, 3, 30)))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _cut(draw: random.Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])


def _insert(draw: random.Random, path: Path) -> None:
    content = path.read_bytes()
    at, length = draw.randrange(len(content) + 1), draw.choice((1, 8, 1000))
    path.write_bytes(content[:at] + draw.choice((bytes(length), draw.randbytes(length))) + content[at:])


def _change_json(draw: random.Random, path: Path) -> None:
    path.write_text(json.dumps(_changed(draw, json.loads(path.read_bytes()))))


def _changed(draw: random.Random, values: Any) -> Any:
    """Return a JSON value with one place changed: removed, renamed, repeated or replaced."""
    if isinstance(values, dict) and values and draw.random() < 0.95:
        key = draw.choice(sorted(values))
        kept = {name: value for name, value in values.items() if name != key}
        return draw.choice(
            (kept, kept | {str(draw.choice(ODD)): values[key]}, *[kept | {key: _changed(draw, values[key])}] * 8)
        )
    if isinstance(values, list) and values and draw.random() < 0.7:
        at = draw.randrange(len(values))
        return draw.choice((values[:at], values * 2, [*values[:at], _changed(draw, values[at]), *values[at + 1 :]]))
    if isinstance(values, int) and draw.random() < 0.5:
        return values * draw.choice((-1, 2, 3, 1000)) + draw.choice((0, 1))
    return draw.choice(ODD)


def _change_header(draw: random.Random, path: Path) -> None:
    content = path.read_bytes()
    if len(content) < 8:
        raise ValueError("has no header")
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    written = json.dumps(_changed(draw, header)).encode()
    length = draw.choice((len(written),) * 9 + (draw.getrandbits(64),))
    path.write_bytes(struct.pack("<Q", length) + written + data)


def main(count: int, seed: int) -> None:
    """Try damaged models under a limit of address space, and print how often each kind of outcome occurred."""
    with tempfile.TemporaryDirectory() as folder:
        good_models(Path(folder) / "good")
        found: Counter[str] = Counter()
        slowest = (0.0, "")
        for what, path in damaged_models(Path(folder) / "good", Path(folder) / "work", count=count, seed=seed):
            begin = time.monotonic()
            try:
                found["loads" if outcome(path) == "loads" else "refused"] += 1
            except AssertionError as error:
                found["WRONG"] += 1
                print(what, error, sep="\n    ")
            slowest = max(slowest, (time.monotonic() - begin, what))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(dict(found), f"slowest: {slowest[0]:.2f} s ({slowest[1]}); peak memory {peak:.2f} GB")


if __name__ == "__main__":
    spare = 1 << 30
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
    main(int(sys.argv[1]), int(sys.argv[2]))

"""`fastssl extract`: write the features of every recording to safetensors shards with an index."""

import hashlib
import logging
from pathlib import Path

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError
from fastssl.data.corpus import Corpus, Problem, cut_name, open_corpus
from fastssl.data.recordings import chunk_hop
from fastssl.data.rules import check_rules, recorded_rules
from fastssl.eval.encode import (
    Reading,
    continue_unrecorded,
    encode_recordings,
    fixed_frame_period_s,
    frame_grid,
    open_encoder_at,
    recorded_normalize,
)
from fastssl.eval.shards import SETTINGS_FILE, Shards, check_folder
from fastssl.eval.showing import track
from fastssl.folder_lock import folder_lock
from fastssl.kernels.prepacked_conv.weights import Format
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.names import encoded, stored

logger = logging.getLogger(__name__)


def extract(
    model: str | Path,
    audio: str | Path,
    output: str | Path,
    *,
    layer: int | None = None,
    rate: float | None = None,
    frame_period_ms: float | None = None,
    chunk_s: float = 60.0,
    overlap_s: float = 6.0,
    channel: int | None = None,
    normalize: bool | None = None,
    rules: int | None = None,
    shard_mb: float = 512.0,
    inference: Format | None = None,
    device: str = "auto",
) -> list[Problem]:
    """Write the features of every recording.

    `output` gets shards `features-00000.safetensors`, ... of fp32 tensors (frames, width), and `index.jsonl` with one
    line per recording: `file`, `shard`, `key` (the tensor's name in the shard: the recording's id, or its JSON string
    if the id is not UTF-8), `layer`, `frames` and `frame_period_s`. Running it again with the same arguments continues
    after an interruption. Recordings whose shard is missing or damaged are extracted again.

    Recordings longer than `chunk_s` are encoded in overlapping chunks; each of their frames has at least half the
    overlap as context on either side. An encoder with group norm (the base model) normalises over a whole chunk, so the
    features of such recordings depend slightly on `chunk_s` everywhere; with layer norm (large), only through the lost
    context.

    Args:
        model: Encoder to use: a run of `fastssl pretrain`, a Transformers folder, a model name on the Hub, or a
            fairseq checkpoint.
        audio: Folder of recordings (WAV, FLAC, Ogg, MP3, ...; 4 kHz or more, any number of channels; subfolders too),
            Lhotse manifest (.jsonl.gz), or Lhotse shar directory.
        output: Folder for the shards and the index.
        layer: Layer to write: 0 is the input of the first layer, L the output of layer L; by default the last.
        rate: Rate of a model with a sequence compressor: 0 keeps every frame, 1 gives the learned segments; by default
            the model's own, which is 1 unless it was trained at a single rate.
        frame_period_ms: Mean frame period to compress to, in milliseconds, instead of a rate. It applies to each chunk;
            the index gives the period of each recording.
        chunk_s: Cut recordings longer than this many seconds into overlapping chunks of at most this length.
        overlap_s: Overlap of neighbouring chunks, in seconds.
        channel: Channel to read; by default all channels are averaged.
        normalize: Scale each recording to zero mean and unit variance; by default as the output folder records it if it
            exists, else as the model's config says.
        rules: Version of the rules by which recordings are found and decoded; by default that of the output folder if
            it exists, else the newest.
        shard_mb: Size of a shard, in megabytes; once a shard has reached it, the next one begins.
        inference: Format of the encoder's weights on the CPU: fp32, bf16 or int8. Each is faster than the one before
            and less exact (docs/inference.md). By default the weights stay as they are.
        device: Device to encode on: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.

    Returns:
        The recordings that could not be used.

    Raises:
        ValueError: MODEL, AUDIO, the layer, the chunk length or the output folder is invalid, the folder was begun
            with other settings, or another process is writing to it.
        WriteError: The system refused to write.
    """
    normalize = recorded_normalize(Path(output) / SETTINGS_FILE) if normalize is None else normalize
    encoder = open_encoder_at(
        model, device=device, rate=rate, frame_period_ms=frame_period_ms, normalize=normalize, inference=inference
    )
    continue_unrecorded(encoder, Path(output) / SETTINGS_FILE)
    layers = encoder.config.num_hidden_layers
    if layer is not None and not 0 <= layer <= layers:
        raise ValueError(f"--layer: the model has layers 0 to {layers}, got {layer}")
    layer = layers if layer is None else layer
    grid = frame_grid(encoder.config)
    rules = recorded_rules(Path(output) / SETTINGS_FILE) if rules is None else check_rules(rules, "--rules")
    corpus = open_corpus(audio, min_duration_s=grid.shortest_s, window_s=None, max_bad_fraction=1.0, rules=rules)
    # Check the chunks before writing anything: the folder stores its settings and then accepts no others.
    for rate_hz in sorted({cut.recording.sampling_rate for cut in corpus.cuts}):
        chunk_hop(rate_hz, chunk_s=chunk_s, overlap_s=overlap_s, grid=grid)
    settings = {
        "audio": str(Path(audio).absolute()),
        "weights": weights_digest(encoder),
        "layer": layer,
        "rate": rate,
        "frame_period_ms": frame_period_ms,
        "chunk_s": chunk_s,
        "overlap_s": overlap_s,
        "channel": channel,
        "normalize": encoder.normalizes,
        "rules": rules,
        "inference": inference,
    }
    folder, option = Path(output), "--output"
    check_folder(folder, name="features", option=option)  # before the lock writes to it
    with folder_lock(folder, option=option):
        shards = Shards(
            folder,
            settings=settings,
            unrecorded={"normalize": encoder.unrecorded_normalize, "inference": None},
            name="features",
            option=option,
            shard_bytes=round(shard_mb * 1e6),
        )
        shards.drop_damaged()
        return _write_features(shards, encoder, corpus, Reading(chunk_s, overlap_s, channel), layer=layer)


def _write_features(
    shards: Shards, encoder: SpeechEncoder, corpus: Corpus, reading: Reading, *, layer: int
) -> list[Problem]:
    """Encode the recordings that are missing; return those that could not be used."""
    grid = frame_grid(encoder.config)
    if shards.entries:
        logger.info("%d recordings were extracted by an earlier run and are skipped", len(shards.entries))
    problems = list(corpus.problems)
    frame_period_s = fixed_frame_period_s(encoder)
    cuts = [cut for cut in corpus.cuts if stored(cut.id) not in shards.entries]
    encoded = encode_recordings(encoder, cuts, reading, layer=layer)
    for cut, features in track(encoded, "recordings", total=len(cuts)):
        if isinstance(features, AudioError):
            problems.append(Problem(cut_name(cut), str(features)))
        else:
            entry = {"file": cut_name(cut), "layer": layer, "frame_period_s": frame_period_s, "frames": len(features)}
            if frame_period_s is None:
                before = grid.count(round(cut.duration * SAMPLE_RATE_HZ))
                entry["frame_period_s"] = grid.stride / SAMPLE_RATE_HZ * before / len(features)
            shards.add(stored(cut.id), {stored(cut.id): features}, entry)
    shards.close()
    for problem in problems:
        logger.warning("left out: %s", problem)
    logger.info("%d recordings in %s, %d left out", len(shards.entries), shards.folder, len(problems))
    return problems


def weights_digest(encoder: SpeechEncoder) -> str:
    """Return a hash of an encoder's weights, which identifies the model wherever its folder is.

    Returns:
        32 hexadecimal digits (BLAKE2b, 16 bytes) over the names and bytes of all tensors except `masked_spec_embed`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in encoder.state_dict().items():
        if name == "masked_spec_embed":
            continue  # features do not depend on it, and a checkpoint without one gets a random one at each load
        digest.update(encoded(name))
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

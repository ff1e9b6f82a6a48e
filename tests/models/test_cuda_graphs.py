"""Test CUDA graphs without a GPU: filled batches, and the use of pretended graphs on the CPU."""

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastssl import ops
from fastssl.kernels import dispatch
from fastssl.kernels.dispatch import BACKENDS
from fastssl.kernels.positional_conv import op as positional_conv
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn import cuda_graphs
from fastssl.nn.buckets import Bucket, FilledLayout
from fastssl.nn.cuda_graphs import CudaGraphs
from fastssl.ops import StridedConvLayer
from fastssl.packing import Layout, Packed

_SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_FRONT_END: dict[str, Any] = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
_LAYER_NORM: dict[str, Any] = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
_DATA2VEC = {"feat_extract_norm": "layer", "model_type": "data2vec-audio", "num_conv_pos_embeddings": 2}
CONFIGS: dict[str, EncoderConfig | ConformerConfig] = {
    "group norm": EncoderConfig(**_SIZE, **_FRONT_END),
    "layer norm": EncoderConfig(**_SIZE, **_FRONT_END, **_LAYER_NORM),
    "wavlm": EncoderConfig(**_SIZE, **_FRONT_END, model_type="wavlm", num_buckets=16, max_bucket_distance=20),
    "wavlm large": EncoderConfig(**_SIZE, **_FRONT_END, **_LAYER_NORM, model_type="wavlm"),
    "hubert": EncoderConfig(**_SIZE, **_FRONT_END, model_type="hubert", feat_proj_layer_norm=False),
    "data2vec": EncoderConfig(**_SIZE, **(_FRONT_END | _DATA2VEC), conv_pos_kernel_size=5),
    "conformer": ConformerConfig(**_SIZE, conv_dim=(16, 20), conv_depthwise_kernel_size=5),
}


def make_encoder(kind: str = "group norm", **changes: Any) -> SpeechEncoder:
    torch.manual_seed(0)
    config = CONFIGS[kind]
    encoder = ConformerEncoder(config) if isinstance(config, ConformerConfig) else Encoder(config)
    return encoder.eval()


def waveforms_of(lengths: Sequence[int], seed: int = 0) -> Packed:
    samples = torch.randn(sum(lengths), 1, generator=torch.Generator().manual_seed(seed))
    return Packed(samples, Layout.from_lengths(lengths))


def filled(encoder: SpeechEncoder, waveforms: Packed) -> Packed:
    """Fill a batch up to its bucket, as graphs do."""
    config, (samples, layout) = encoder.config, waveforms
    bucket = Bucket.of(layout.lengths, receptive_field=config.receptive_field_samples, hop=config.samples_per_frame)
    zeros = samples.new_zeros(bucket.samples - layout.total, 1)
    return Packed(torch.cat([samples, zeros]), FilledLayout.fill(layout.lengths, bucket))


def assert_same_states(found: Sequence[Packed], expected: Sequence[Packed]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.layout.lengths == other.layout.lengths
        assert one.layout.cu_seqlens.tolist() == other.layout.cu_seqlens.tolist()
        assert (one.layout.max_length, one.layout.total) == (other.layout.max_length, other.layout.total)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lengths", [[16_000], [9_000, 0, 399, 12_345, 5_000, 2_000], [400] * 9])
def test_filling_a_batch_changes_no_bit_of_its_utterances(kind: str, lengths: list[int]) -> None:
    encoder = make_encoder(kind)
    waveforms = waveforms_of(lengths)
    batch = filled(encoder, waveforms)
    assert batch.values.shape == (batch.layout.total, 1)
    with torch.no_grad():
        expected = encoder(waveforms).hidden_states
        for state, wanted in zip(encoder(batch).hidden_states, expected, strict=True):
            count = len(lengths)
            assert state.layout.lengths[:count] == wanted.layout.lengths
            assert torch.equal(state.values[: wanted.layout.total], wanted.values)
            assert state.values.isfinite().all()
            assert state.layout.total > wanted.layout.total or batch.layout.lengths[-1] < 2_000


@pytest.mark.parametrize("backend", [name for name in BACKENDS["strided_conv"]["cpu"] if name != "reference"])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_every_kernel_gives_utterances_the_same_bits_beside_a_filler(
    backend: str, norm: Literal["group", "layer"]
) -> None:
    """A filler may have fewer frames than it has windows, which kernels never see otherwise."""
    torch.manual_seed(0)
    layers = [
        StridedConvLayer(torch.randn(16, 1, 10), 5, norm=norm),
        StridedConvLayer(torch.randn(16, 16, 3), 2, norm="none" if norm == "group" else norm),
        StridedConvLayer(torch.randn(16, 16, 2), 2),
    ]
    lengths = [700, 0, 9, 1_303]
    batch = waveforms_of(lengths)
    layout = FilledLayout.fill(lengths, Bucket(sum(lengths) + 1_100, 8, 2_048))
    samples = torch.cat([batch.values, torch.zeros(1_100, 1)])
    expected, exact = ops.strided_conv_stack(batch.values, layers, batch.layout, backend=backend)
    found, frames = ops.strided_conv_stack(samples, layers, layout, backend=backend)
    assert frames.lengths[: len(lengths)] == exact.lengths
    assert frames.lengths[-1] < Layout.from_lengths([1_100]).after_conv(10, 5).after_conv(3, 2).after_conv(2, 2).total
    assert torch.equal(found[: exact.total], expected)
    assert found.isfinite().all()
    if backend in BACKENDS["varlen_attention"]["cpu"]:
        q, k, v = found.view(-1, 2, 8), found.flip(1).view(-1, 2, 8), found.sin().view(-1, 2, 8)
        attended = ops.varlen_attention(q, k, v, frames, backend=backend)
        q, k, v = (x[: exact.total].contiguous() for x in (q, k, v))
        assert torch.equal(attended[: exact.total], ops.varlen_attention(q, k, v, exact, backend=backend))


@settings(max_examples=100, deadline=None)
@given(
    convolutions=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=5),
    batches=st.lists(st.lists(st.integers(0, 3_000), min_size=1, max_size=9), min_size=2, max_size=4),
)
def test_totals_of_all_layers_depend_on_the_bucket_only(
    convolutions: list[tuple[int, int]], batches: list[list[int]]
) -> None:
    convolutions = [(max(kernel, stride), stride) for kernel, stride in convolutions]
    receptive_field = hop = 1
    for kernel, stride in convolutions:
        receptive_field, hop = receptive_field + (kernel - 1) * hop, hop * stride
    sequences = max(Bucket.of(lengths, receptive_field=1, hop=1).sequences for lengths in batches)
    samples = max(map(sum, batches)) + sequences * receptive_field + hop
    bucket = Bucket(samples, sequences, samples)
    seen = set()
    for lengths in batches:
        layout: Layout = FilledLayout.fill(lengths, bucket)
        exact, sizes = Layout.from_lengths(lengths), []
        for kernel, stride in convolutions:
            before, layout, exact = layout, layout.after_conv(kernel, stride), exact.after_conv(kernel, stride)
            assert layout.lengths[: len(lengths)] == exact.lengths
            # The filler has no more frames than it has windows, so no kernel reads after the end of its input.
            assert 0 <= layout.lengths[-1] <= max(0, (before.lengths[-1] - kernel) // stride + 1)
            assert layout.total == sum(layout.lengths)
            assert layout.max_length >= max(layout.lengths)
            sizes.append((layout.total, len(layout.lengths), layout.max_length))
        seen.add(tuple(sizes))
    assert len(seen) == 1


def test_a_kernel_below_its_stride_is_refused_if_the_filler_is_too_short() -> None:
    layout = FilledLayout.fill([7, 7, 7], Bucket(22, 4, 32))
    with pytest.raises(ValueError, match=r"kernel: CUDA graphs need one of at least the stride, got 1 and 6"):
        layout.after_conv(1, 6)


@dataclass
class Pretended:
    """Graphs on the CPU: what was captured runs again, and its results are copied to where the first ones are."""

    captures: int = 0
    replays: int = 0
    pools: list[Any] = field(default_factory=list)
    fails: bool = False

    def capture(self, run: Callable[[], list[Packed]], pool: Any) -> tuple[Callable[[], None], list[Packed]]:
        run()
        self.pools.append(pool)
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        states = run()
        for state in states:
            state.values.fill_(torch.nan)  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            for state, new in zip(states, run(), strict=True):
                state.values.copy_(new.values)
                state.layout.cu_seqlens.copy_(new.layout.cu_seqlens)

        return replay, states


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    made = Pretended()
    # As on a GPU, because the convolution of the CPU reads lengths on the host.
    monkeypatch.setattr(positional_conv, "_torch_conv", positional_conv._conv_with_gaps)
    monkeypatch.setattr(cuda_graphs, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda_graphs, "_capture", made.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


@pytest.mark.parametrize("kind", CONFIGS)
def test_graphs_are_captured_once_per_bucket_and_give_the_same_bits(kind: str, pretended: Pretended) -> None:
    encoder = make_encoder(kind)
    plain = copy.deepcopy(encoder)
    assert encoder.use_cuda_graphs() is encoder
    batches = [
        waveforms_of(lengths, seed) for seed, lengths in enumerate([[16_000], [15_500], [9_000, 6_500], [16_200]])
    ]
    with torch.inference_mode():
        found = [encoder(batch) for batch in batches]
        expected = [plain(batch) for batch in batches]
    assert (pretended.captures, pretended.replays) == (2, 4)  # two utterances are another bucket
    for one, other in zip(found, expected, strict=True):  # later runs did not overwrite the results of earlier ones
        assert_same_states(one.hidden_states, other.hidden_states)
        assert_same_states([one.features], [other.features])
        assert one.compressed is None


def test_raw_audio_of_either_shape_is_normalised_before_the_graph(pretended: Pretended) -> None:
    encoder = make_encoder("layer norm")
    assert encoder.normalizes
    column = waveforms_of([9_000, 6_500])
    column = Packed(0.1 * column.values + 0.2, column.layout)
    with torch.no_grad():
        expected = [encoder(column).hidden_states, encoder(column, normalize=False).hidden_states]
        encoder.use_cuda_graphs()
        for waveforms in (column, Packed(column.values.squeeze(1), column.layout)):
            assert_same_states(encoder(waveforms).hidden_states, expected[0])
            assert_same_states(encoder(waveforms, normalize=False).hidden_states, expected[1])
    assert (pretended.captures, pretended.replays) == (1, 4)
    assert not torch.allclose(expected[0][-1].values, expected[1][-1].values, atol=1e-3)


def test_weights_in_place_have_effect_and_replaced_parts_are_captured_again(pretended: Pretended) -> None:
    encoder: Any = make_encoder().use_cuda_graphs()
    batch = waveforms_of([16_000])

    def captures_and_bits() -> int:
        with torch.no_grad():
            assert_same_states(encoder(batch).hidden_states, copy.deepcopy(encoder).use_cuda_graphs(False)(batch)[1])
        return pretended.captures

    assert captures_and_bits() == 1
    layer = encoder.encoder.layers[0].feed_forward
    with torch.no_grad():
        layer.output_dense.weight.mul_(2)
        encoder.load_state_dict({name: tensor * 1.5 for name, tensor in encoder.state_dict().items()})
    assert captures_and_bits() == 1
    layer.output_dense.weight.data = layer.output_dense.weight.data.clone()
    assert captures_and_bits() == 2
    layer.output_dense.bias = torch.nn.Parameter(torch.ones(32))
    assert captures_and_bits() == 3
    layer.output_dense = copy.deepcopy(layer.output_dense)
    assert captures_and_bits() == 4
    assert captures_and_bits() == 4


def test_calls_that_a_graph_cannot_serve_run_without_one(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = make_encoder().use_cuda_graphs(max_duration_s=2.0)
    batch = waveforms_of([16_000])
    encoder(batch).features.values.sum().backward()  # with gradients
    with torch.no_grad():
        encoder(waveforms_of([32_001]))
        encoder(Packed(torch.zeros(0, 1), Layout.from_lengths([])))
        encoder(waveforms_of([0, 0]))
        for module, name in ((cuda_graphs, "casts_are_shared"), (torch.cuda, "is_current_stream_capturing")):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, lambda: True)
                encoder(batch)
        encoder.encoder.layers[1].train()
        encoder(batch)
        encoder.eval()
        handle = encoder.encoder.layers[1].register_forward_hook(lambda *_: None)
        encoder(batch)
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        encoder(batch)
        handle.remove()
        layer = encoder.encoder.layers[0]
        layer.forward = layer.forward
        encoder(batch)
        del layer.forward
        with pytest.raises(ValueError, match="waveforms: expected"):
            encoder(Packed(torch.zeros(9, 2), Layout.from_lengths([9])))
        encoder.encode(encoder.extract_features(batch))
        with pytest.raises(ValueError, match="has no compressor"):
            encoder(batch, rate=1.0)
        assert pretended.captures == 0
        encoder(batch)
        assert pretended.captures == 1
        encoder.use_cuda_graphs(False)(batch)
        assert (pretended.captures, pretended.replays) == (1, 1)
        make_encoder()(batch)  # off by default
    assert pretended.captures == 1


def test_autocast_and_dtype_have_graphs_of_their_own(pretended: Pretended) -> None:
    encoder = make_encoder().use_cuda_graphs()
    plain, batch = make_encoder(), waveforms_of([16_000])
    with torch.inference_mode():
        for _ in range(2):
            assert_same_states(encoder(batch).hidden_states, plain(batch).hidden_states)
            with torch.autocast("cpu", torch.bfloat16):
                assert_same_states(encoder(batch).hidden_states, plain(batch).hidden_states)
    assert (pretended.captures, pretended.replays) == (2, 4)


def test_the_graph_that_was_not_used_for_the_longest_time_is_dropped(pretended: Pretended) -> None:
    encoder = make_encoder().use_cuda_graphs(max_graphs=2)
    short, middle, long = (waveforms_of([length]) for length in (4_000, 9_000, 20_000))
    captures = []
    with torch.no_grad():
        for batch in (short, middle, short, long, short, middle):
            encoder(batch)
            captures.append(pretended.captures)
    assert captures == [1, 2, 2, 3, 3, 4]


def test_copies_and_pickles_have_the_settings_and_no_graphs(pretended: Pretended) -> None:
    encoder = make_encoder("conformer").use_cuda_graphs()  # PyTorch does not pickle weight norm
    batch = waveforms_of([16_000])
    with torch.no_grad():
        expected = encoder(batch)
        for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            assert_same_states(again(batch).hidden_states, expected.hidden_states)
    assert pretended.captures == 3
    assert encoder.state_dict().keys() == make_encoder("conformer").state_dict().keys()


def test_features_serve_a_later_backward(pretended: Pretended) -> None:
    encoder = make_encoder().use_cuda_graphs()
    with torch.inference_mode():
        layout = encoder(waveforms_of([16_000, 8_000])).features.layout
    assert not layout.cu_seqlens.is_inference()
    with torch.no_grad():
        layout = encoder(waveforms_of([16_000, 8_000])).features.layout
    assert layout.sequence_ids.tolist() == [0] * 49 + [1] * 24


def test_what_a_forward_computes_from_a_layout_is_computed_again_in_each_run(pretended: Pretended) -> None:
    """A warm-up may not leave tensors of the first batch on the layout, nor casts in autocast's cache."""
    module, caches = nn.Linear(1, 1).eval(), []

    def forward(waveforms: Packed) -> list[Packed]:
        caches.append(torch.is_autocast_cache_enabled())
        ids = waveforms.layout.sequence_ids  # nothing asked for them
        return [Packed(waveforms.values + ids.unsqueeze(1), waveforms.layout)]

    graphs = CudaGraphs(receptive_field=1, hop=1, max_graphs=2, max_samples=10_000)
    with torch.inference_mode():
        for lengths in ([3_000, 2_000], [1_000, 4_000]):
            samples = waveforms_of(lengths)
            (found,) = graphs.run(module, forward, lambda layout: layout, samples) or []
            assert_same_states([found], forward(samples))
    assert pretended.captures == 1
    assert caches[:3] == [False, False, True]  # warm-up, capture, and the call without a graph


def test_a_part_that_reads_lengths_on_the_host_is_refused(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = waveforms_of([16_000])
    refused = pytest.raises(ValueError, match="a part of this encoder reads lengths on the host")
    with torch.no_grad():
        with refused:
            make_encoder().double().use_cuda_graphs()(Packed(batch.values.double(), batch.layout))
        monkeypatch.setattr(dispatch, "DEFAULT_BACKEND", "reference")
        for kind in CONFIGS:
            with refused:
                make_encoder(kind).use_cuda_graphs()(batch)
    assert pretended.captures == 0


@pytest.mark.parametrize("op", ["strided_conv", "positional_conv", "varlen_attention"])
def test_no_reference_reads_lengths_of_a_captured_layout(op: str) -> None:
    layout = FilledLayout.fill([40, 20], Bucket(100, 4, 64))
    held = layout.holding(layout.tensors())
    x, q = torch.ones(100, 4), torch.ones(100, 2, 2)
    calls: dict[str, Callable[[], object]] = {
        "strided_conv": lambda: ops.strided_conv(x, torch.ones(4, 4, 2), held, stride=1, backend="reference"),
        "positional_conv": lambda: ops.positional_conv(x, torch.ones(4, 2, 3), held, backend="reference"),
        "varlen_attention": lambda: ops.varlen_attention(q, q, q, held, backend="reference"),
    }
    assert len(held.lengths) == 4
    with pytest.raises(TypeError):
        calls[op]()


def test_a_filler_is_zero_after_a_longer_batch(pretended: Pretended) -> None:
    encoder: Any = make_encoder().use_cuda_graphs()
    with torch.no_grad():
        for length in (16_100, 15_500):
            encoder(Packed(torch.full((length, 1), torch.inf), Layout.from_lengths([length])), normalize=False)
    (graph,) = encoder._cuda_graphs._graphs.values()
    assert graph._samples[:15_500].isinf().all()
    assert graph._samples[15_500:].eq(0).all()


def test_an_encoder_with_a_compressor_is_refused() -> None:
    config = EncoderConfig(**_SIZE, **_FRONT_END, compressor="average", compressor_factor=2)
    with pytest.raises(ValueError, match="this encoder has a compressor"):
        Encoder(config).use_cuda_graphs()
    for limits in ({"max_graphs": 0}, {"max_duration_s": 0.0}):
        with pytest.raises(ValueError, match="must be positive"):
            make_encoder().use_cuda_graphs(**limits)


def test_graphs_share_a_pool_until_a_capture_fails(pretended: Pretended) -> None:
    """PyTorch may still count memory as in use by the capture that failed."""
    encoder = make_encoder().use_cuda_graphs()
    first, second, third, fourth = (waveforms_of([length]) for length in (4_000, 9_000, 20_000, 30_000))
    with torch.no_grad():
        encoder(first)
        encoder(second)
        pretended.fails = True
        with pytest.raises(RuntimeError, match="not permitted"):
            encoder(third)
        pretended.fails = False
        expected = copy.deepcopy(encoder).use_cuda_graphs(False)
        for batch in (third, fourth, first):
            assert_same_states(encoder(batch).hidden_states, expected(batch).hidden_states)
    numbers = list(map(list(dict.fromkeys(pretended.pools)).index, pretended.pools))
    assert numbers == [0, 0, 0, 1, 1]
    assert pretended.captures == 4


class _Stream:
    """A stream of the device that was current when it was made, as PyTorch makes them."""

    device = 0  # the current one
    current: ClassVar[dict[int, Any]] = {}

    def __init__(self) -> None:
        self.of = _Stream.device

    def wait_stream(self, other: "_Stream") -> None:
        assert self.of == other.of


class _CapturedGraph:
    """A graph that notes the streams on which its capture begins and ends."""

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.replay = len

    def capture_begin(self, *memory: object, **options: object) -> None:
        self.streams.append(torch.cuda.current_stream())

    def capture_end(self) -> None:
        self.capture_begin()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace streams and graphs, but not PyTorch's context that captures; return the graphs that are made."""

    class Enter:
        def __init__(self, stream: _Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before = _Stream.device, _Stream.current[self.stream.of]
            _Stream.device, _Stream.current[self.stream.of] = self.stream.of, self.stream

        def __exit__(self, *error: object) -> None:
            _Stream.device, _Stream.current[self.stream.of] = self.before

    made: list[Any] = []

    def make() -> _CapturedGraph:
        made.append(_CapturedGraph())
        return cast(_CapturedGraph, made[-1])

    for device in (0, 1):
        monkeypatch.setattr(_Stream, "device", device)
        monkeypatch.setitem(_Stream.current, device, _Stream())
    replaced: dict[str, Any] = {"Stream": _Stream, "stream": Enter, "CUDAGraph": make, "graph_pool_handle": object}
    replaced |= {"current_stream": lambda: _Stream.current[_Stream.device]}
    replaced |= dict.fromkeys(("synchronize", "empty_cache"), lambda: None)
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    return made


def test_a_graph_is_captured_on_the_device_of_its_encoder(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of another device, the kernels would run once, and the graph would be empty."""
    for device in (0, 1):
        monkeypatch.setattr(_Stream, "device", device)
        ran: list[Any] = []

        def run() -> list[Packed]:
            ran.append(torch.cuda.current_stream())  # noqa: B023
            return []

        pool = cuda_graphs._Pool.new()
        for _ in range(2):
            cuda_graphs._capture(run, pool)
            assert graphs[-1].streams == [pool.stream] * 2
        assert ran == [pool.stream] * 4
        assert pool.stream.of == device
        assert pool.stream is not torch.cuda.current_stream()


def test_the_current_stream_stays_after_a_failed_capture(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: _CapturedGraph) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(_CapturedGraph, "capture_end", fail)
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="a previous error during capture"):
        cuda_graphs._capture(list, cuda_graphs._Pool.new())
    assert torch.cuda.current_stream() is before

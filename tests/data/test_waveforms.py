import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.data import waveforms
from fastssl.data.waveforms import Waveform, pack_waveforms, waveform_batch

LENGTHS = (16000, 1, 0, 801, 7)


def recordings(lengths: tuple[int, ...] = LENGTHS) -> list[Waveform]:
    generator = np.random.default_rng(0)
    return [(0.3 + 0.05 * generator.standard_normal(length)).astype(np.float32) for length in lengths]


def test_concatenates() -> None:
    parts = recordings()
    packed = pack_waveforms(parts, normalize=False)
    assert packed.dtype == np.float32
    assert np.array_equal(packed, np.concatenate(parts))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_batch_has_one_channel_and_the_lengths(normalize: bool) -> None:
    parts = recordings()
    batch = waveform_batch(parts, normalize=normalize)
    assert batch.layout.lengths == LENGTHS
    assert np.array_equal(batch.values.numpy(), pack_waveforms(parts, normalize=normalize)[:, None])


def test_normalises_each_waveform() -> None:
    packed = pack_waveforms(recordings(), normalize=True)
    for part in np.split(packed, np.cumsum(LENGTHS)[:-1]):
        if len(part) > 1:
            assert abs(part.mean(dtype=np.float64)) < 1e-6
            assert abs(part.var(dtype=np.float64) - 1) < 1e-3
    assert packed[16000] == 0  # a single sample is its own mean


def test_equals_the_feature_extractor_of_transformers() -> None:
    extractor = pytest.importorskip("transformers").Wav2Vec2FeatureExtractor(do_normalize=True)
    (waveform,) = recordings((4000,))
    expected = extractor(waveform, sampling_rate=16000)["input_values"][0]
    np.testing.assert_allclose(pack_waveforms([waveform], normalize=True), expected, atol=1e-5)


def test_silence_and_a_large_offset() -> None:
    silence = np.zeros(100, np.float32)
    assert not pack_waveforms([silence], normalize=True).any()
    offset = (1000 + np.sin(np.arange(16000) / 50)).astype(np.float32)  # E[x^2] - E[x]^2 in fp32 would be noise
    assert abs(pack_waveforms([offset], normalize=True).std(dtype=np.float64) - 1) < 1e-3


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=6), st.booleans())
def test_batch_mates_do_not_matter(lengths: list[int], normalize: bool) -> None:
    parts = recordings(tuple(lengths))
    together = pack_waveforms(parts, normalize=normalize)
    alone = [pack_waveforms([part], normalize=normalize) for part in parts]
    assert np.array_equal(together, np.concatenate([np.empty(0, np.float32), *alone]))


def test_a_bad_waveform_spoils_no_other() -> None:
    first, second = recordings((50, 60))
    first[3] = np.nan
    packed = pack_waveforms([first, second], normalize=True)
    assert np.isnan(packed[:50]).all()
    assert np.array_equal(packed[50:], pack_waveforms([second], normalize=True))


def test_views_are_read_as_they_are() -> None:
    stereo = np.arange(20, dtype=np.float32).reshape(10, 2)
    assert pack_waveforms([stereo[:, 1], stereo[::-1, 0]], normalize=False).tolist() == [
        *range(1, 20, 2),
        *range(18, -1, -2),
    ]


@pytest.mark.parametrize("normalize", [False, True])
def test_compiled_and_numpy_agree(normalize: bool) -> None:
    host = pytest.importorskip("fastssl._host", reason="the host module was not built")
    parts = recordings()
    compiled = host.pack_waveforms(parts, normalize, 1e-7)
    np.testing.assert_allclose(compiled, waveforms._pack_with_numpy(parts, normalize, 1e-7), atol=1e-6)


@pytest.mark.parametrize("waveform", [np.zeros((2, 3), np.float32), np.zeros(5, np.float64), np.zeros(5, np.int16)])
def test_rejects_what_is_no_waveform(waveform: Waveform) -> None:
    with pytest.raises(ValueError, match=r"waveforms: item 1 is .* expected float32"):
        pack_waveforms([np.zeros(4, np.float32), waveform], normalize=True)

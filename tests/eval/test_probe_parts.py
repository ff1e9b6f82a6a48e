"""Test parts of the probe: scores against hand and brute-force results, tables, heads against plain convolutions."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.eval.probe.features import Features, Standard
from fastssl.eval.probe.heads import Examples, Head, Learner, Window, convolve
from fastssl.eval.probe.scores import edit_distance, equal_error_rate, pair_scores
from fastssl.eval.probe.tables import Symbols, fold_values, phones_of_digits, read_table, split_table
from fastssl.packing import Layout


@pytest.mark.parametrize(
    ("same", "different", "expected"),
    [
        ([0.9, 0.8, 0.4], [0.7, 0.3, 0.2], 1 / 3),
        ([0.9, 0.8], [0.1, 0.2, 0.3], 0.0),
        ([0.0], [1.0], 1.0),
        # A threshold above 0.5 rejects one of the two same pairs; a threshold of 0.5 rejects none, but accepts one of
        # the two different pairs. The line between these two points has equal error rates at a quarter.
        ([0.5, 0.9], [0.5, 0.1], 0.25),
        ([0.5, 0.5], [0.5, 0.5, 0.5], 0.5),
        ([0.5, 0.9], [0.5, 0.5, 0.5, 0.1], 0.3),
    ],
)
def test_equal_error_rate_by_hand(same: list[float], different: list[float], expected: float) -> None:
    assert equal_error_rate(torch.tensor(same), torch.tensor(different)) == pytest.approx(expected, abs=1e-12)


def _brute_force(same: list[float], different: list[float]) -> float:
    points = []
    for threshold in [*sorted({*same, *different}), float("inf")]:
        rejected = sum(score < threshold for score in same) / len(same)
        accepted = sum(score >= threshold for score in different) / len(different)
        points.append((rejected, accepted))
    for (x0, y0), (x1, y1) in pairwise(points):
        for share in np.linspace(0, 1, 20_001):
            if x0 + share * (x1 - x0) >= y0 + share * (y1 - y0):
                return float(x0 + share * (x1 - x0))
    raise AssertionError


@pytest.mark.parametrize("seed", range(4))
def test_equal_error_rate_is_that_of_the_roc(seed: int) -> None:
    random = np.random.default_rng(seed)
    same = random.integers(2, 12, 15).astype(float).tolist()  # many ties
    different = random.integers(0, 9, 40).astype(float).tolist()
    found = equal_error_rate(torch.tensor(same), torch.tensor(different))
    assert found == pytest.approx(_brute_force(same, different), abs=1e-4)


def test_scores_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="0 pairs of the same class and 1 of different classes"):
        equal_error_rate(torch.tensor([]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="must be finite"):
        equal_error_rate(torch.tensor([1.0]), torch.tensor([float("nan")]))


def test_pairs_are_of_two_recordings() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
    same, different = pair_scores(embeddings, torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 7]))
    half = 0.5**0.5
    assert sorted(same.tolist()) == [0.0, 1.0]  # the pair within recording 5 is left out
    torch.testing.assert_close(different.sort().values, torch.tensor([half] * 3))


@pytest.mark.parametrize(
    ("found", "expected", "edits"),
    [("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("ab", "ba", 2), ("xabcx", "abc", 2)],
)
def test_edit_distance(found: str, expected: str, edits: int) -> None:
    assert edit_distance([ord(c) for c in found], [ord(c) for c in expected]) == edits


def test_phones_follow_from_digits() -> None:
    assert phones_of_digits("7 0", where="here") == "S EH V AH N Z IH R OW"
    with pytest.raises(ValueError, match="here has 'x' in column 'digits'"):
        phones_of_digits("1x", where="here")


def test_symbols_are_characters_or_what_blanks_separate() -> None:
    assert Symbols(["101", "20"]).encode("210", where="") == [3, 2, 1]
    spaced = Symbols(["AH N", "T"])
    assert spaced.names == ["AH", "N", "T"]
    assert spaced.encode("T AH", where="") == [3, 1]
    assert Symbols(["a b"], separated=False).names == [" ", "a", "b"]
    with pytest.raises(ValueError, match=r"table: 1\.wav has 'X' in its label"):
        spaced.encode("AH X", where="table: 1.wav")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("file\tspeaker\na.wav\tx\n", "no column 'path' among file, speaker; separate columns by tabs"),
        ("path\tspeaker\n", "has no rows"),
        ("path\tspeaker\na.wav\n", "row 2 has 1 fields, but the header has 2"),
        ("path\tspeaker\na.wav\tx\na.wav\ty\n", "is listed twice"),
        ("path\tspeaker\tspeaker\na.wav\tx\ty\n", "has two columns 'speaker'"),
        # A quote without its pair would hide the rows after it, up to the next quote or the end.
        ('path\tsaid\na.wav\t"yes\nb.wav\tno\n', r"is not a table: .* \(up to line 3\); .* each of its quotes doubled"),
        ('path\tsaid\na.wav\t"yes\nb.wav\t"no\nc.wav\tx\n', r"is not a table: .* \(up to line 3\)"),
        ('path\tsaid\na.wav\t"yes\nb.wav\tno"\nc.wav\tx\n', "row 2 has a line break in a label, or a quote"),
        ('path\tsaid\na.wav\t"Yes" he said\n', "is not a table: .* each of its quotes doubled"),
        ('path\t"said\na.wav\tyes"\nb.wav\tno\n', "row 1 has a line break in a label"),
    ],
)
def test_tables_that_do_not_serve(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "table.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "table.tsv")


def test_a_table_without_lines_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "table.tsv").write_text("path\tspeaker\n")
    os.truncate(tmp_path / "table.tsv", 2**40)
    with pytest.raises(ValueError, match=r"table\.tsv: is not a table: field larger than field limit"):
        read_table(tmp_path / "table.tsv")


def test_a_table_from_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,speaker\r\na.wav,x\r\n", encoding="utf-8-sig", newline="")
    assert read_table(tmp_path / "t.csv").column("speaker") == ["x"]


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("speaker,path,digits\nx,a.wav,12\ny,/b/c.wav,\n")
    table = read_table(tmp_path / "t.csv")
    assert [row.path for row in table.rows] == [tmp_path / "a.wav", Path("/b/c.wav")]
    assert table.column("speaker") == ["x", "y"]
    with pytest.raises(ValueError, match="no column 'voice'; choose one of speaker, digits"):
        table.column("voice")
    with pytest.raises(ValueError, match=r"column 'digits' of c\.wav is empty"):
        table.column("digits")
    with pytest.raises(ValueError, match="no such file"):
        read_table(tmp_path / "no.tsv")


def test_quotes_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('path\tsaid\n"a\n.wav"\the said "yes"\nb.wav\t"""Yes"" he said"\nc.wav\t"\t"\n')
    table = read_table(tmp_path / "t.tsv")
    assert [row.path.name for row in table.rows] == ["a\n.wav", "b.wav", "c.wav"]
    assert [row.labels["said"] for row in table.rows] == ['he said "yes"', '"Yes" he said', "\t"]


def test_a_table_is_divided_by_path(tmp_path: Path) -> None:
    lines = [f"{index}.wav\tx\n" for index in range(400)]
    (tmp_path / "a.tsv").write_text("path\tspeaker\n" + "".join(lines))
    (tmp_path / "b.tsv").write_text("path\tspeaker\n" + "".join(reversed(lines)))
    parts = split_table(read_table(tmp_path / "a.tsv"))
    again = split_table(read_table(tmp_path / "b.tsv"))
    paths = [{row.path for row in part.rows} for part in parts]
    assert paths == [{row.path for row in part.rows} for part in again]
    assert sum(map(len, paths)) == len(set.union(*paths)) == 400
    assert [round(len(part), -1) for part in paths] == pytest.approx([280, 60, 60], abs=20)


def test_folds() -> None:
    assert fold_values(["c", "a", "b", "a"], 1) == [["a"], ["b"], ["c"]]
    assert fold_values(list("edcba"), 2) == [["a", "b"], ["c", "d", "e"]]
    with pytest.raises(ValueError, match=r"fold_size: must be from 1 to half the number of values \(3: .*; got 2"):
        fold_values(["a", "b", "c"], 2)


def test_windows_are_of_seconds() -> None:
    assert [Window.of_seconds(0.1, period) for period in (0.01, 0.02, 0.04)] == [(10, 2), (5, 1), (2, 1)]
    assert Window.of_seconds(0.0, 0.02) == (0, 1)


def _features(*lengths: int, layers: int = 3, width: int = 5) -> Features:
    generator = torch.Generator().manual_seed(7)
    frames = [4 + 2 * torch.randn(layers, length, width, generator=generator) for length in lengths]
    seconds = tuple(length / 50 for length in lengths)
    return Features(frames, tuple(range(len(lengths))), seconds, (), 0, tuple(lengths))


def test_standardised_over_the_chosen_examples() -> None:
    features = _features(30, 1, 50, 20)
    for frames in features.frames:
        frames[1, :, 2] = 3.0
    standard = Standard.of(features, [0, 1, 2])
    values = torch.cat([standard(features.frames[index]) for index in (0, 1, 2)], dim=1)
    expected = torch.ones(3, 5)
    expected[1, 2] = 0  # this feature is constant
    torch.testing.assert_close(values.mean(1), torch.zeros(3, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std(1, unbiased=False), expected, rtol=0, atol=1e-5)


def test_whitened_over_the_chosen_examples() -> None:
    features = _features(300, 1, 500, 20)
    for frames in features.frames:
        frames[0, :, 1] += 0.9 * frames[0, :, 0]
        frames[1, :, 2] = 3.0  # a constant feature
        frames[2, :, 4] = frames[2, :, 3]  # two equal features, so the covariance is singular
    standard = Standard.of(features, [0, 1, 2], whiten=True)
    values = torch.cat([standard(features.frames[index]) for index in (0, 1, 2)], dim=1)
    plain = standard._replace(whitening=None)
    before = torch.cat([plain(features.frames[index]) for index in (0, 1, 2)], dim=1)
    for layer in range(3):
        variances, directions = torch.linalg.eigh(torch.cov(before[layer].T, correction=0))
        expected = directions @ torch.diag(variances / (variances + 1)) @ directions.T
        torch.testing.assert_close(torch.cov(values[layer].T, correction=0), expected, rtol=0, atol=1e-4)
    assert standard.whitening is not None
    torch.testing.assert_close(standard.whitening, standard.whitening.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [Window(0, 1), Window(3, 1), Window(4, 2)])
def test_a_head_is_a_convolution_of_each_example_alone(window: Window) -> None:
    features = _features(9, 1, 24)
    standard = Standard.of(features, range(3))
    examples = Examples(features, (2, 0, 1), ((1,), (1,), (1,)))
    head = Head(3, 5, torch.full((4,), 0.25), window)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(head.layer_logits)
    torch.nn.init.normal_(head.bias)
    logits = head(*examples.gather(standard, window.reach)).unpack()
    for example, found in zip(examples.chosen, logits, strict=True):
        mixed = torch.einsum("l,ltd->dt", head.layer_logits.softmax(0), standard(features.frames[example]))
        plain = F.conv1d(mixed[None], head.weight, head.bias, stride=window.stride, padding=window.reach)
        torch.testing.assert_close(found, plain[0].T, rtol=1e-4, atol=1e-4)
        assert len(found) == window.outputs(features.frames[example].shape[1])


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_heads_convolution(stride: int) -> None:
    torch.manual_seed(0)
    layout = Layout.from_lengths([6, 3, 4])

    def of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return convolve(x, weight, bias, layout, stride=stride).values

    given = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((13, 2), (4, 2, 3), (4,))]
    assert torch.autograd.gradcheck(of, given)


def test_what_ctc_cannot_emit_is_left_out() -> None:
    examples = Examples(_features(3, 3, 4, 4), (0, 1, 2, 3), ((1, 2, 3), (1, 1, 2), (1, 1, 2), (1, 2, 1, 2, 1)))
    assert examples.feasible(Window(5, 1)).chosen == (0, 2)
    assert examples.feasible(Window(5, 2)).chosen == ()


def _learner(standard: Standard, *, rates: tuple[float, ...] = (1e-2,)) -> Learner:
    return Learner("ctc", 4, Window(1, 1), rates=rates, standard=standard, name="the encoder")


def test_a_head_begins_with_how_often_each_symbol_comes() -> None:
    features = _features(20, 30)
    examples = Examples(features, (0, 1), ((1, 1, 2), (3, 1)))
    learner = _learner(Standard.of(features, (0, 1)), rates=(1e-9,))
    learner.learn(examples, steps=1, batch_s=1, seed=0)
    shares = learner.heads[0].bias.softmax(0)
    torch.testing.assert_close(shares, torch.tensor([45 / 50, 3 / 50, 1 / 50, 1 / 50]), rtol=1e-4, atol=1e-6)


def test_gradients_of_heads_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    features = _features(20, 30)
    examples = Examples(features, (0, 1), ((1, 1, 2), (3, 1)))
    moved = []
    for norm in (0.3, 1e-20):
        monkeypatch.setattr("fastssl.eval.probe.heads.CLIP_NORM", norm)
        learner = _learner(Standard.of(features, (0, 1)))
        learner.learn(examples, steps=3, batch_s=1, seed=0)
        moved.append(learner.heads[0].weight.abs().max().item())
    # Adam's step does not depend on the gradient's size, unless the gradient is negligible next to Adam's eps.
    assert moved[0] > 1e-3
    assert moved[1] < 1e-9


def test_seeds_change_the_order_and_nothing_else_does() -> None:
    features = _features(20, 30, 25, 12)
    examples = Examples(features, (0, 1, 2, 3), ((1, 1, 2), (3, 1), (2, 3), (3,)))
    standard = Standard.of(features, examples.chosen)

    def weights(seed: int, rates: tuple[float, ...]) -> Tensor:
        learner = _learner(standard, rates=rates)
        learner.learn(examples, steps=5, batch_s=0.5, seed=seed)
        return learner.heads[0].weight.detach()

    assert torch.equal(weights(1, (1e-2,)), weights(1, (1e-2, 1e-3)))
    assert not torch.equal(weights(1, (1e-2,)), weights(2, (1e-2,)))


def test_a_loss_that_is_not_finite_names_encoder_and_rate() -> None:
    features = _features(20, 30)
    learner = _learner(Standard.of(features, (0, 1)), rates=(1e-3, 1e36))
    with pytest.raises(ValueError, match=r"the encoder: the loss at learning rate 1e\+36 is nan"):
        learner.learn(Examples(features, (0, 1), ((1, 1, 2), (3, 1))), steps=50, batch_s=1, seed=0)

"""Test every architecture with every tool: the cells of docs/drop-in.md that no other file tests for all of them."""

import copy
import json
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastssl
from tests.interop.tiny_models import TRAINED_FAMILIES, assert_close, padded_batch, transformers_model

transformers: Any = pytest.importorskip("transformers")

#: Variants of torchaudio's architectures; its HuBERT is its wav2vec 2.0 with other weights.
TORCHAUDIO = ("wav2vec2 base", "wav2vec2 large", "wavlm base")
ALL = [
    *(("transformers", variant) for variant in TRAINED_FAMILIES),
    *(("torchaudio", variant) for variant in TORCHAUDIO),
]
EVERY_ARCHITECTURE = pytest.mark.parametrize(("library", "variant"), ALL)
WAVEFORMS, MASK = padded_batch([5000, 5000])  # nothing to pad: every architecture gives the original's numbers


def make(library: str, variant: str) -> Any:
    if library == "transformers":
        return transformers_model(variant, apply_spec_augment=False)
    from tests.interop import tiny_torchaudio

    return tiny_torchaudio.make(variant)


def frames(model: Any, waveforms: Tensor = WAVEFORMS) -> Tensor:  # (B, T) -> (B, F, D)
    out = model(waveforms)
    values: Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
    return values


def score(x: Tensor) -> Tensor:  # (B, F, D) -> ()
    return (x * torch.sin(torch.arange(x[0].numel())).view_as(x[0])).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    score(frames(model)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    return grads


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():  # the exact gradient of a bias on keys is zero, so only rounding remains
        assert (found[name] - grad).abs().max() <= 2e-3 * grad.abs().max() + 1e-6 * scale, name


@contextmanager
def packed() -> Iterator[None]:
    """Fail if the original code runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*original code")
        yield


@pytest.mark.parametrize("first", ["accelerate", "peft"])
@EVERY_ARCHITECTURE
def test_lora(library: str, variant: str, first: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    attention = [] if variant.startswith("wavlm") else ["q_proj", "v_proj"]  # which WavLM only reads
    lora = peft.LoraConfig(target_modules=["intermediate_dense", *attention], init_lora_weights=False, r=2)

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model, lora)

    original = make(library, variant).train()
    model = copy.deepcopy(original)
    model = adapted(fastssl.accelerate(model)) if first == "accelerate" else fastssl.accelerate(adapted(model))
    expected = gradients(adapted(original))
    with packed():
        found = gradients(model)
        assert_same_gradients(found, expected)
        assert len(found) == 6 * (1 + len(attention))
        assert all("lora_" in name for name in found)
        with torch.no_grad():
            before = frames(model)
            assert_close(frames(model.merge_and_unload()), before, 1e-4)


@pytest.mark.parametrize("variant", TRAINED_FAMILIES)
def test_gradient_checkpointing(variant: str) -> None:
    model = fastssl.accelerate(make("transformers", variant)).train()
    with packed():
        expected = gradients(model)
        model.gradient_checkpointing_enable()
        again: list[int] = []
        for layer in model.encoder.layers:
            checkpoint = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = counted(checkpoint, again)
        found = gradients(model)
    assert len(again) == 3 * 2  # each layer once forward and once backward
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def counted(checkpoint: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        def noted(*inner: Any) -> Any:
            calls.append(1)
            return function(*inner)

        return checkpoint(noted, *args)

    return run


@pytest.mark.parametrize(("library", "variant"), [*ALL, ("transformers", "conformer base")])
def test_compile_leaves_the_encoder_packed(library: str, variant: str) -> None:
    model = fastssl.accelerate(make(library, variant))
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad(), packed():
        for waveforms in (WAVEFORMS, WAVEFORMS[:1, :2900], WAVEFORMS[:, :900]):
            assert torch.equal(frames(compiled, waveforms), frames(model, waveforms))
    assert not graphs


def _ddp_gradients(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    grads = {}
    for library, variant in ALL:
        model = _trained(library, variant)
        parallel = nn.parallel.DistributedDataParallel(model)
        score(frames(parallel, WAVEFORMS[rank : rank + 1, : (5000, 900)[rank]])).backward()
        grads[library, variant] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(grads, results)
    torch.distributed.destroy_process_group()


def _trained(library: str, variant: str) -> Any:
    """Return an accelerated model in training mode, without parameters that no loss reaches, which DDP refuses."""
    model = fastssl.accelerate(make(library, variant)).train()
    if library == "transformers":
        model.masked_spec_embed.requires_grad_(False)
    return model


def test_ddp_averages_the_gradients_of_two_processes(tmp_path: Path) -> None:
    make("torchaudio", TORCHAUDIO[0])  # skips the test here, not in a process, where torchaudio does not import
    results = tmp_path / "grads.pt"
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=_ddp_gradients, args=(rank, str(tmp_path / "store"), str(results))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = torch.load(results)
    assert list(found) == ALL
    for architecture, grads in found.items():
        model = _trained(*architecture)
        with packed():
            total = score(frames(model, WAVEFORMS[:1])) + score(frames(model, WAVEFORMS[1:, :900]))
        (total / 2).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same_gradients(grads, expected)


def test_a_pipeline_gives_each_recording_s_own_text_in_any_batch(tmp_path: Path) -> None:
    """The original's rows end with letters that it makes of padding."""
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: index for index, symbol in enumerate("_?|abcdefgh")}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(
        str(tmp_path / "vocab.json"), pad_token="_", unk_token="?", bos_token=None, eos_token=None
    )
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    original = transformers_model("wav2vec2 large", "ForCTC")
    recordings = [waveform[mask.bool()].numpy() for waveform, mask in zip(*padded_batch([90_000, 30_000]), strict=True)]

    def texts(model: Any, batch_size: int) -> list[str]:
        recognise: Any = transformers.pipeline(
            "automatic-speech-recognition", model=model, tokenizer=tokenizer, feature_extractor=extractor, device="cpu"
        )
        return [found["text"] for found in recognise(list(recordings), batch_size=batch_size)]

    alone = texts(original, 1)
    assert all(len(text) > 10 for text in alone)
    assert texts(original, 2)[1] != alone[1]
    fastssl.accelerate(original)
    with packed():
        assert texts(original, 2) == texts(original, 1) == alone


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.* have no effect")
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no quantised layers here")
@pytest.mark.parametrize("first", ["accelerate", "quantise"])
@pytest.mark.parametrize("variant", TRAINED_FAMILIES)
def test_dynamically_quantised_transformers(variant: str, first: str) -> None:
    """They give what the quantised original gives; one scale serves all frames of a call, as in the original."""

    def quantised(model: nn.Module) -> Any:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    original = make("transformers", variant)
    model = copy.deepcopy(original)
    model = quantised(fastssl.accelerate(model)) if first == "accelerate" else fastssl.accelerate(quantised(model))
    original = quantised(original)
    with torch.no_grad(), packed():
        if variant.startswith("wavlm"):  # it reads the weights of its projections, which quantised layers hide
            for one in (original, model):
                with pytest.raises((AttributeError, TypeError)):
                    frames(one)
        else:
            assert type(model.encoder.layers[0].feed_forward.output_dense).__module__.endswith("dynamic.modules.linear")
            assert_close(frames(model, WAVEFORMS[:1]), frames(original, WAVEFORMS[:1]), 1e-2)


def test_exports_of_torchaudio_s_wavlm_are_of_the_original() -> None:
    """The original takes no lengths, neither does an export of it; accelerated, the model does."""
    original = make("torchaudio", "wavlm base")
    model = fastssl.accelerate(copy.deepcopy(original))
    lengths = torch.tensor([5000, 5000])
    with pytest.raises(AssertionError):
        original(WAVEFORMS, lengths)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"torch\.export records the call, so the original code"):
            exported = torch.export.export(model, (WAVEFORMS,)).module()
        assert torch.equal(exported(WAVEFORMS)[0], original(WAVEFORMS)[0])
        with packed():
            assert torch.equal(model(WAVEFORMS, lengths)[0], model(WAVEFORMS)[0])

"""What people do with a pruned encoder on a CPU: dynamic int8 in torch and ONNX Runtime, other types, export, training.

A layer without heads or filters must not show. The measure is the zero-filled twin (`pad`), which has no empty layer:
quantized, it has the same ranges and so the same rounding.
"""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.encoders import FAMILIES, FILTERS, HIDDEN, difference, logits, tuned_masks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao import quantization

from effnn import paths
from effnn.base import InvalidInput
from effnn.ltp.pruning.masks import masked
from effnn.ltp.pruning.shrinking.cut import EmptyLinear
from effnn.ltp.pruning.shrinking.saving import load_pruned
from effnn.ltp.pruning.shrinking.shrink import pad, shrink

BOUND = 0.25
"""|float - int8| of logits of about 1; 0.01 to 0.12 is usual for these models with and without empty layers."""
KINDS = ("uneven", "no heads", "no filters", "neither", "all empty")
EMPTY = KINDS[1:]
STRUCTURES = ("bert", "distilbert", "vit")
"""Families whose layers are built differently."""


@pytest.fixture(autouse=True)
def _quiet():
    """torch announces that its quantization and its older ONNX exporter will move."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _small(family: str = "bert", kind: str = "neither"):
    model, batch = FAMILIES[family]()
    batch.pop("labels")
    return shrink(model, tuned_masks(kind)), batch


def _int8(model: nn.Module, **options) -> nn.Module:
    return quantization.quantize_dynamic(copy.deepcopy(model), **options)


def test_dynamic_int8_on_every_engine():
    """In a process of its own, since an empty map ends it on some engines (SIGFPE)."""
    program = f"""
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from test_int8 import _int8, _small, difference, logits, pad
torch.set_num_threads(1)
for engine in torch.backends.quantized.supported_engines:
    if engine == "none":
        continue
    torch.backends.quantized.engine = engine
    for family in {STRUCTURES}:
        for kind in {KINDS}:
            print(engine, family, kind, end=" ", file=sys.stderr, flush=True)
            small, batch = _small(family, kind)
            quantized, twin = _int8(small), logits(_int8(pad(small)), batch)
            found = logits(quantized, batch)
            twice = difference(found, logits(quantized, batch))
            found = [difference(found, logits(small, batch)), difference(found, twin), twice]
            print(json.dumps([engine, family, kind, found]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(paths.LIB), str(paths.TESTS)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    engines = set(torch.backends.quantized.supported_engines) - {"none"}
    assert len(lines) == len(engines) * len(STRUCTURES) * len(KINDS) and {line[0] for line in lines} == engines
    for *case, (error, from_twin, twice) in lines:
        assert error <= BOUND and from_twin <= 0.02 and twice == 0, (case, error, from_twin, twice)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_other_forms_of_dynamic_quantization(family):
    small, batch = _small(family)
    expected = logits(small, batch)
    every = {nn.Linear: quantization.default_dynamic_qconfig}
    every[nn.Embedding] = quantization.float_qparams_weight_only_qconfig
    for options in (
        {"inplace": True},
        {"dtype": torch.float16},
        {"qconfig_spec": every},
        {"qconfig_spec": {nn.Linear: quantization.per_channel_dynamic_qconfig}},
        {"qconfig_spec": {nn.Linear}, "dtype": torch.qint8},
    ):
        assert difference(logits(_int8(small, **options), batch), expected) <= BOUND, options
    assert difference(logits(small, batch), expected) == 0


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_copies_of_an_int8_model(family):
    small, batch = _small(family)
    quantized = _int8(small)
    expected = logits(quantized, batch)
    fresh = _int8(type(small)(small.config))
    fresh.load_state_dict(quantized.state_dict())
    traced = torch.jit.trace(quantized, example_kwarg_inputs=batch, strict=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    for twin in copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), fresh:
        assert difference(logits(twin, batch), expected) == 0
    assert difference(torch.jit.load(buffer)(**batch)["logits"], expected) == 0


def test_an_int8_model_is_refused_with_a_way_out(tmp_path):
    model, batch = FAMILIES["bert"]()
    small = shrink(model, tuned_masks("neither"))
    quantized = _int8(small)
    with pytest.raises(InvalidInput, match="takes float weights.*load_pruned.*state_dict"):
        quantized.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(InvalidInput, match="pad takes float weights.*call pad first"):
        pad(quantized)
    with pytest.raises(InvalidInput, match="shrink takes float weights.*shrink first"):
        shrink(_int8(model), tuned_masks("neither"))
    small.save_pretrained(tmp_path)
    torch.save(quantized.state_dict(), tmp_path / "int8.pt")
    again = _int8(load_pruned(tmp_path))
    assert difference(logits(again, batch), logits(quantized, batch)) == 0
    again.load_state_dict(torch.load(tmp_path / "int8.pt", weights_only=False))
    assert difference(logits(again, batch), logits(quantized, batch)) == 0


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family, kind", [("bert", kind) for kind in EMPTY] + [("distilbert", "neither"), ("vit", "neither")]
)
def test_onnx_runtime_float_and_int8(family, kind, dynamo, tmp_path):
    """At the traced sizes and, dynamic axes, at others."""
    if dynamo:
        pytest.importorskip("onnxscript")
    runtime, tools = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxruntime.quantization")
    small, batch = _small(family, kind)
    axes = {name: {0: "rows"} if value.dim() > 2 else {0: "rows", 1: "tokens"} for name, value in batch.items()}
    sizes = {name: {axis: torch.export.Dim.AUTO for axis in names} for name, names in axes.items()}
    dynamic = {"dynamic_shapes": sizes, "verbose": False} if dynamo else {"dynamic_axes": axes}
    files = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    torch.onnx.export(small, kwargs=batch, f=files[0], dynamo=dynamo, input_names=list(batch), **dynamic)
    tools.quantize_dynamic(*files)
    other = {name: value[:2] if value.dim() > 2 else value[:2, :7] for name, value in batch.items()}
    for file, bound in zip(files, (1e-4, BOUND), strict=True):
        session = runtime.InferenceSession(file)
        for inputs in batch, other:
            found = session.run(None, {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()})[0]
            assert difference(torch.from_numpy(found), logits(small, inputs)) <= bound


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_torch_export_with_dynamic_sizes(family):
    small, batch = _small(family)
    sizes = {name: {0: torch.export.Dim.AUTO} for name in batch}
    exported = torch.export.export(small, (), batch, dynamic_shapes=sizes).module()
    for inputs in batch, {name: value[:2] for name, value in batch.items()}:
        assert difference(exported(**inputs).logits, logits(small, inputs)) <= 1e-5


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)])
def test_other_types(family, dtype, bound, tmp_path):
    small, batch = _small(family)
    expected = logits(small, batch)
    small.save_pretrained(tmp_path)
    cast = copy.deepcopy(small).to(dtype)
    for model in cast, load_pruned(tmp_path, dtype=dtype):
        assert {value.dtype for value in model.state_dict().values()} == {dtype}
        assert difference(logits(model, batch).float(), expected) <= bound
    assert difference(logits(pad(cast), batch), logits(cast, batch)) <= bound
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(logits(small, batch).float(), expected) <= 0.1


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_empty_linear_computes_what_the_linear_map_does(sizes, bias):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells that there is nothing to initialise
        linear = nn.Linear(*sizes, bias=bias)
    if bias:
        nn.init.normal_(linear.bias)
    empty = EmptyLinear(linear)
    for shape in ((3,), (2, 3), (2, 3, 4), ()):
        inputs = torch.randn(*shape, sizes[0])
        assert torch.equal(empty(inputs), linear(inputs))
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in linear.state_dict().items()
    }
    assert not isinstance(empty, nn.Linear), "quantizers would take it for one"


@pytest.mark.parametrize("kind", EMPTY)
def test_the_state_dict_is_that_of_cut_linear_maps(kind):
    """Names and shapes in a file are those of plain linear maps with rows or columns left out, empty ones too."""
    model, batch = FAMILIES["bert"]()
    small, masks = shrink(model, tuned_masks(kind)), tuned_masks(kind)
    plain = {}
    for key, value in model.state_dict().items():
        if ".layer." in key:
            layer = int(key.split(".layer.")[1].split(".")[0])
            heads = masks.heads[layer].repeat_interleave(HIDDEN // 4)
            if ".attention.self." in key:
                if not heads.any():
                    continue  # nothing is computed there
                value = value[heads != 0]
            elif ".attention.output.dense.weight" in key:
                value = value[:, heads != 0] * heads[heads != 0]
            elif ".intermediate.dense." in key:
                value = value[masks.filters[layer] != 0]
            elif ".output.dense.weight" in key:
                value = value[:, masks.filters[layer] != 0] * masks.filters[layer][masks.filters[layer] != 0]
        plain[key] = value
    expected = logits(small, batch)
    assert {key: value.shape for key, value in small.state_dict().items()} == {k: v.shape for k, v in plain.items()}
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    small.load_state_dict(plain)
    assert difference(logits(small, batch), expected) <= 1e-6


def test_weights_that_do_not_fit_an_empty_layer_are_refused(tmp_path):
    small, _ = _small()
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "bert.encoder.layer.1.output.dense.weight"
    assert tensors[key].shape == (HIDDEN, 0)
    for wrong in torch.ones(HIDDEN, FILTERS), None:
        changed = {name: value for name, value in tensors.items() if name != key}
        save_file(
            changed if wrong is None else changed | {key: wrong}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(InvalidInput, match="do not fit"):
            load_pruned(tmp_path)


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
def test_an_empty_layer_is_trained_by_its_bias(family):
    model, batch = FAMILIES[family]()
    small = shrink(model, tuned_masks("all empty"))
    assert all(parameter.numel() for parameter in small.parameters()), "some clippers and loggers cannot take these"
    with masked(model, tuned_masks("all empty")):
        model(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    small(**batch).loss.backward()
    for name, parameter in small.named_parameters():
        assert difference(parameter.grad, expected[name]) <= 1e-5, name
    assert torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0, norm_type=float("inf")) > 0
    biases = [module.bias for module in small.modules() if isinstance(module, EmptyLinear) and module.out_features]
    before = [bias.detach().clone() for bias in biases]
    assert len(biases) == 2 * small.config.num_hidden_layers
    torch.optim.AdamW(small.parameters(), lr=0.1).step()
    assert all(difference(bias, old) > 0.01 for bias, old in zip(biases, before, strict=True))

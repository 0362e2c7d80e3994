"""Quantized checkpoints of several tools: read, sliced, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import ConfigError
from cluster.model.quantization.reader import read_quantized
from cluster.model.quantization.stored import read_stored_weights
from cluster.model.quantization.weight import QuantizedWeight, dequantize
from cluster.model.tensor_index import read_tensor_index
from cluster.model.weights import SafetensorsSource

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"
NUM_OUTPUTS, NUM_INPUTS = 16, 64
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: the neighbour that lies at each place of a word


def write(folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    named = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def read(folder: Path, *parts: slice) -> QuantizedWeight:
    weight = read_quantized(SafetensorsSource(folder), NAME, *parts)
    assert weight is not None
    return weight


def words_of(codes: list[list[int]]) -> torch.Tensor:
    """Pack eight codes a word, the first lowest, by plain arithmetic."""
    rows = [
        [sum(c << (4 * i) for i, c in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)]
        for row in codes
    ]
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in rows]
    return torch.tensor(signed, dtype=torch.int32)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed))


def group_of(num_bits: int = 4, strategy: str = "group", **changes: Any) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": num_bits, "type": "int", "strategy": strategy}
    weights |= {"symmetric": True, "group_size": 32 if strategy == "group" else None} | changes
    return {"targets": ["Linear"], "weights": weights}


def config_of(
    group: dict[str, Any], format_: str = "pack-quantized", **more: Any
) -> dict[str, Any]:
    groups = {"config_groups": {"group_0": group}}
    return {"quant_method": "compressed-tensors", "format": format_, **groups, **more}


CODES = draw(NUM_OUTPUTS, NUM_INPUTS)
SCALES = (torch.arange(NUM_OUTPUTS * 2).view(NUM_OUTPUTS, 2) + 1) / 64
ZEROS = draw(NUM_OUTPUTS, 2, seed=1)
SHAPE = torch.tensor([NUM_OUTPUTS, NUM_INPUTS])
WORDS = words_of(CODES.tolist())


def expected(zeros: Any) -> torch.Tensor:
    """Return the weight that codes, scales and zeros are, in groups of 32."""
    wide = [torch.as_tensor(t).repeat_interleave(32, 1) for t in (zeros, SCALES)]
    return (CODES - wide[0]) * wide[1]


def packed(folder: Path) -> Path:
    config = config_of(group_of())
    return write(
        folder, config, weight_packed=WORDS, weight_scale=SCALES.bfloat16(), weight_shape=SHAPE
    )


def packed_with_zeros(folder: Path) -> Path:
    config = config_of(group_of(symmetric=False))
    zeros = words_of(ZEROS.T.tolist()).T
    return write(
        folder,
        config,
        weight_packed=WORDS,
        weight_scale=SCALES.bfloat16(),
        weight_shape=SHAPE,
        weight_zero_point=zeros,
    )


def gptq(folder: Path, **changes: Any) -> Path:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False} | changes
    less = 0 if changes.get("checkpoint_format") == "gptq_v2" else 1
    return write(
        folder,
        config,
        qweight=words_of(CODES.tolist()).T,  # eight inputs in a word
        qzeros=words_of(((ZEROS.T - less) % 16).tolist()),
        scales=SCALES.T.half(),
        g_idx=torch.arange(NUM_INPUTS) // 32,
    )


def awq(folder: Path) -> Path:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}

    def ordered(matrix: torch.Tensor) -> torch.Tensor:
        words = matrix.view(matrix.shape[0], -1, 8)[..., list(AWQ_ORDER)]
        return words_of(words.flatten(1).tolist())

    return write(
        folder,
        {**config, "version": "gemm"},
        qweight=ordered(CODES.T.contiguous()),
        qzeros=ordered(ZEROS.T.contiguous()),
        scales=SCALES.T.half(),
    )


INT4 = {
    "packed": (packed, torch.full((NUM_OUTPUTS, 2), 8)),
    "packed with zeros": (packed_with_zeros, ZEROS),
    "gptq": (gptq, (ZEROS - 1) % 16 + 1),  # a zero of 0 cannot be written less 1: it reads 16
    "gptq_v2": (lambda folder: gptq(folder, checkpoint_format="gptq_v2"), ZEROS),
    "awq": (awq, ZEROS),
}


@pytest.mark.parametrize("kind", INT4)
def test_int4_checkpoints_are_read_whole_and_in_parts(kind: str, tmp_path: Path) -> None:
    make, zeros = INT4[kind]
    folder = make(tmp_path)
    whole = expected(zeros)
    weight = read(folder)
    assert (weight.scheme, weight.shape, weight.group_size) == ("int4", tuple(SHAPE), 32)
    assert weight.codes.dtype is torch.uint8
    assert torch.equal(dequantize(weight), whole)
    for rows in (slice(None), slice(0, 8), slice(5, 11)):
        for columns in (slice(None), slice(0, 32), slice(32, 64)):
            part = dequantize(read(folder, rows, columns))
            assert torch.equal(part, whole[rows, columns])
    with pytest.raises(ConfigError, match=r"=32 cuts model\.layers\.0\.self_attn\.q_proj\.weight"):
        read(folder, slice(None), slice(0, 16))
    source = SafetensorsSource(folder)
    assert source.has(NAME)
    assert source.shape(NAME) == (NUM_OUTPUTS, NUM_INPUTS)
    assert torch.equal(source.read(NAME, slice(32, 64), 1), whole[:, 32:])


def test_symmetric_weights_have_no_zeros(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    for zero in (7, 6):
        zeros = words_of([[zero] * NUM_OUTPUTS] * 2)
        tensors = {"qweight": WORDS.T, "qzeros": zeros, "scales": SCALES.T.half()}
        folder = write(tmp_path, config, **tensors)
        if zero == 7:
            assert read(folder).zeros is None
            assert torch.equal(dequantize(read(folder)), expected(torch.full((16, 2), 8)))
            continue
        with pytest.raises(ConfigError, match="said to be symmetric"):
            read(folder)
    assert read(write(tmp_path, {**config, "sym": False}, **tensors)).zeros is not None


@pytest.mark.parametrize(
    ("strategy", "group_size", "num_inputs", "expected_size"),
    [("channel", None, 64, 64), ("group", 256, 512, 128), ("channel", None, 96, 32)],
)
def test_wider_groups_become_several_with_one_scale(
    strategy: str, group_size: int | None, num_inputs: int, expected_size: int, tmp_path: Path
) -> None:
    codes = draw(8, num_inputs)
    num_groups = num_inputs // group_size if group_size else 1
    scales = (torch.arange(8 * num_groups).view(8, -1) + 1.0) / 32
    folder = write(
        tmp_path,
        config_of(group_of(4, strategy, group_size=group_size)),
        weight_packed=words_of(codes.tolist()),
        weight_scale=scales,
    )
    weight = read(folder)
    assert weight.group_size == expected_size
    wide = scales.repeat_interleave(num_inputs // num_groups, 1)
    assert torch.equal(dequantize(weight), (codes - 8) * wide)
    part = slice(expected_size * (num_inputs > 64), num_inputs)
    assert torch.equal(dequantize(read(folder, slice(2, 5), part)), ((codes - 8) * wide)[2:5, part])


@pytest.mark.parametrize("shape", [(NUM_OUTPUTS, 1), (NUM_OUTPUTS,), (1,), ()])
def test_int8_scales_are_per_output(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = (draw(NUM_OUTPUTS, NUM_INPUTS) - 8).to(torch.int8)
    count = int(torch.tensor(shape).prod())
    scales = (torch.arange(count).view(shape) + 1.0) / 64
    strategy = "channel" if count > 1 else "tensor"
    config = config_of(group_of(8, strategy), "int-quantized")
    folder = write(tmp_path, config, weight=codes, weight_scale=scales)
    weight = read(folder, slice(3, 9), slice(8, 40))
    wide = scales.view(-1, 1).expand(NUM_OUTPUTS, -1)[3:9]
    assert torch.equal(dequantize(weight), codes[3:9, 8:40] * wide)
    assert weight.scales.shape == (6,)


def test_fp8_is_read(tmp_path: Path) -> None:
    codes = torch.randn(NUM_OUTPUTS, NUM_INPUTS).to(torch.float8_e4m3fn)
    config = config_of(group_of(8, "channel", type="float"), "float-quantized")
    scales = torch.rand(NUM_OUTPUTS, 1)
    weight = read(write(tmp_path, config, weight=codes, weight_scale=scales), slice(2, 5))
    assert weight.scheme == "fp8"
    assert torch.equal(dequantize(weight), codes[2:5].float() * scales[2:5])


def test_a_module_follows_its_name_before_its_class(tmp_path: Path) -> None:
    codes = torch.ones(NUM_OUTPUTS, NUM_INPUTS, dtype=torch.int8)
    scale = torch.ones(NUM_OUTPUTS, 1)
    for target in (MODULE, r"re:.*q_proj$"):
        eight = {**group_of(8, "channel"), "targets": [target], "format": "int-quantized"}
        config = config_of(group_of())
        config["config_groups"]["group_1"] = eight
        folder = write(tmp_path, config, weight=codes, weight_scale=scale)
        assert read(folder).scheme == "int8"


def test_a_float_weight_is_not_quantized(tmp_path: Path) -> None:
    weight = torch.randn(NUM_OUTPUTS, NUM_INPUTS)
    source = SafetensorsSource(write(tmp_path, config_of(group_of()), weight=weight))
    assert read_quantized(source, NAME) is None
    assert torch.equal(source.read(NAME), weight)
    assert not source.is_quantized


INT8 = config_of(group_of(8, "channel"), "int-quantized")
BYTES = torch.ones(NUM_OUTPUTS, NUM_INPUTS, dtype=torch.int8)
GOOD = {"weight_packed": WORDS, "weight_scale": SCALES}
BAD_CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "method": ({"quant_method": "bitsandbytes"}, GOOD, "quant_method='bitsandbytes' is not read"),
    "format": (config_of(group_of(), "marlin-24"), GOOD, "format='marlin-24' of model.layers.0"),
    "bits": (config_of(group_of(3)), GOOD, "has 3 bits per group in format 'pack-quantized'"),
    "group size": (config_of(group_of(group_size=48)), GOOD, "group_size=48 does not divide"),
    "small groups": (
        config_of(group_of(group_size=16)),
        {**GOOD, "weight_scale": torch.ones(NUM_OUTPUTS, 4)},
        "a scale for each 16 inputs, the products take groups of 32, 64, 128",
    ),
    "order": (config_of(group_of(actorder="group")), GOOD, r"are reordered \(actorder\)"),
    "order index": (
        config_of(group_of()),
        {**GOOD, "weight_g_idx": torch.zeros(NUM_INPUTS, dtype=torch.int32)},
        r"are reordered \(actorder\)",
    ),
    "rotated": (config_of(group_of(), transform_config={"a": 1}), GOOD, "weights are rotated"),
    "no scales": (config_of(group_of()), {"weight_packed": WORDS}, "no tensor .*weight_scale"),
    "no codes": (config_of(group_of()), {"weight_scale": SCALES}, "no tensor .*weight_packed"),
    "no zeros": (config_of(group_of(symmetric=False)), GOOD, "no tensor .*weight_zero_point"),
    "shape": (
        config_of(group_of()),
        {**GOOD, "weight_scale": torch.ones(NUM_OUTPUTS, 3)},
        r"weight_scale is F32 \[16, 3\], expected .* \[16, 2\]; get the checkpoint again",
    ),
    "dtype": (
        config_of(group_of()),
        {**GOOD, "weight_packed": torch.ones(NUM_OUTPUTS, 8)},
        r"weight_packed is F32 \[16, 8\], expected I32",
    ),
    "no group": (
        config_of({**group_of(), "targets": ["re:.*other"]}),
        GOOD,
        "no config group is for model.layers.0.self_attn.q_proj",
    ),
    "malformed": ({"config_groups": 3}, GOOD, "quantization_config in config.json is malformed"),
    "int8 without scales": (INT8, {"weight": BYTES}, "no tensor .*weight_scale"),
    "int8 in groups": (
        config_of(group_of(8), "int-quantized"),
        {"weight": BYTES, "weight_scale": SCALES},
        "8 bits per group",
    ),
    "static": (
        config_of(
            {**group_of(8, "channel"), "input_activations": {"num_bits": 8, "dynamic": False}},
            "int-quantized",
        ),
        {"weight": BYTES, "weight_scale": torch.ones(NUM_OUTPUTS, 1)},
        "have static scales",
    ),
    "gptq order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        GOOD,
        "quant_method='gptq' with desc_act=True is not read here",
    ),
    "gptq bits": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, GOOD, "with bits=8"),
    "awq version": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        GOOD,
        "with version='gemv'",
    ),
    "awq without weights": (
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        GOOD,
        r"no tensor is named \*\.qweight",
    ),
    "gptq shape": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        {"qweight": WORDS.T, "scales": SCALES, "qzeros": WORDS},
        r"scales is F32 \[16, 2\], expected .* \[2, 16\]",
    ),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_read_is_refused_from_its_headers(
    kind: str, tmp_path: Path
) -> None:
    config, tensors, message = BAD_CHECKPOINTS[kind]
    folder = write(tmp_path, config, **tensors)
    with pytest.raises(ConfigError, match=message) as caught:
        read_stored_weights(folder, read_tensor_index(folder))
    assert caught.value.field == "model.path"
    assert str(caught.value).startswith(f"model.path={folder}: ")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scales_that_are_no_numbers_are_refused(bad: float, tmp_path: Path) -> None:
    scales = SCALES.clone()
    scales[3, 1] = bad
    folder = write(tmp_path, config_of(group_of()), weight_packed=WORDS, weight_scale=scales)
    assert read(folder, slice(4, None)).shape == (NUM_OUTPUTS - 4, NUM_INPUTS)
    with pytest.raises(ConfigError, match=r"scales of .*q_proj\.weight are not finite"):
        read(folder)

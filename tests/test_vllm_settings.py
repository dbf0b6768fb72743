"""What "quantization_config" says to vLLM, and how weights are merged and cut. None of it needs vLLM."""

import importlib.util
import logging

import pytest
import torch

from fp6_compile.formats import FORMATS
from fp6_compile.integrations import vllm as plugin
from fp6_compile.integrations.vllm.settings import Scheme, Settings, check_cut, groups, plane_columns, shard_names
from fp6_compile.layouts.packing import PLANES, canonical_shapes, pack

PACKED = {"quant_method": "fp6", "version": 2, "format": "e2m3", "group_size": None}
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
E2M3, E3M2, E2M2 = Scheme("e2m3", None), Scheme("e3m2", None), Scheme("e2m2", None)


def test_a_folder_says_each_weights_format():
    exceptions = {"a.down_proj": {"format": "e3m2", "group_size": 64}, "a.k_proj": {"format": "e3m2"}}
    settings = Settings.parse({**PACKED, "modules_to_not_convert": ["lm_head"], "module_formats": exceptions})
    assert settings.packed
    assert settings.schemes(["lm_head"]) is None
    assert settings.schemes(["a.q_proj", "a.k_proj"]) == [E2M3, E3M2]
    assert settings.schemes(["a.down_proj"]) == [Scheme("e3m2", 64)]


def test_without_a_version_it_is_what_16_bit_weights_become():
    settings = Settings.parse({"quant_method": "fp6", "format": "e3m2", "modules_to_not_convert": ["*.down_proj"]})
    assert not settings.packed
    assert settings.config.format == "e3m2"
    assert settings.schemes(["a.0.down_proj"]) is None
    assert settings.schemes(["a.0.up_proj"]) == [E3M2]
    assert Settings.parse({}) == Settings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**PACKED, "version": 3}, "has version 3, this fp6_compile reads 2: install one that is as new as the folder"),
        ({**PACKED, "format": "e9m9"}, "option 'format' got 'e9m9', needs 'auto' or one of"),
        ({**PACKED, "format": "auto"}, "format: got 'auto', known formats are"),
        ({**PACKED, "group_size": 0}, "option 'group_size' got 0, needs a positive integer or None"),
        ({**PACKED, "module_formats": {"a": {"format": "int6"}}}, "option 'format' got 'int6'"),
        ({"fromat": "e2m3"}, "unknown option 'fromat' in quantization_config, known are "),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.parse(given)


def test_a_newer_folder_may_say_more():
    assert Settings.parse({**PACKED, "made_by": "someone"}).packed


def test_merged_weights_are_all_packed_or_none():
    settings = Settings.parse({**PACKED, "modules_to_not_convert": ["a.k_proj", "a.v_proj"]})
    names = shard_names("a.qkv_proj", MERGED)
    assert names == ["a.q_proj", "a.k_proj", "a.v_proj"]
    with pytest.raises(ValueError, match="a.k_proj is not packed and a.q_proj is, but vLLM multiplies by them at once"):
        settings.schemes(names)
    assert settings.schemes(["a.k_proj", "a.v_proj"]) is None


def test_names_that_are_not_merged_stay():
    assert shard_names("model.layers.0.mlp.down_proj", MERGED) == ["model.layers.0.mlp.down_proj"]
    assert shard_names("lm_head", MERGED) == ["lm_head"]


@pytest.mark.parametrize("fmt", ["e2m3", "e2m2", "e3m3", "e4m3", "e2m1"])
@pytest.mark.parametrize("part", [8, 12, 16, 24, 48, 96])
def test_planes_may_be_cut_where_it_says_so(fmt, part):
    """The columns of a rank's planes are those of its codes; what would not be so is refused."""
    k = 96
    codes = torch.randint(0, 2 ** FORMATS[fmt].bits, (5, k), dtype=torch.uint8)
    try:
        check_cut("down_proj", [Scheme(fmt, None)], k, part)
    except ValueError:
        assert any(part * width % 8 for width in FORMATS[fmt].planes)
        return
    for rank in range(k // part):
        alone = pack(codes[:, rank * part : (rank + 1) * part], FORMATS[fmt], PLANES)
        whole = pack(codes, FORMATS[fmt], PLANES)
        for mine, plane in zip(alone, whole, strict=True):
            columns = plane.shape[1] * part // k
            assert torch.equal(mine, plane[:, rank * columns : (rank + 1) * columns])


def test_groups_are_cut_whole():
    check_cut("down_proj", [Scheme("e2m3", 64)], 512, 256)
    check_cut("down_proj", [Scheme("e2m3", 100)], 250, 250)  # not cut at all
    with pytest.raises(
        ValueError, match="the 512 inputs of down_proj into 128, which are not whole groups of 256: take an"
    ):
        check_cut("down_proj", [Scheme("e2m3", 256)], 512, 128)
    assert (groups(512, 64), groups(250, 100), groups(250, None)) == (8, 3, 1)


def test_formats_share_planes():
    assert plane_columns("x", [E2M3, E3M2], 64) == {4: 32, 2: 16}
    assert plane_columns("x", [E2M3, E2M2], 64) == {4: 32, 2: 16, 1: 8}
    for name, k in (("e2m3", 70), ("e2m2", 70), ("e4m3", 3)):
        shapes = canonical_shapes(FORMATS[name], 1, k)
        assert list(plane_columns("x", [Scheme(name, None)], k).values()) == [columns for _, columns in shapes]


def test_weights_that_cannot_share_planes_are_refused():
    with pytest.raises(
        ValueError, match=r"the weights of x have group sizes \['64', 'None'\].* quantize them with one"
    ):
        plane_columns("x", [E2M3, Scheme("e2m3", 64)], 64)
    with pytest.raises(ValueError, match=r"formats \['e2m2', 'e2m3'\], which pad 68 inputs in different ways"):
        plane_columns("x", [E2M3, E2M2], 68)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_plugin_says_why_it_is_not_registered(caplog):
    with caplog.at_level(logging.ERROR):
        plugin.register()
    assert (
        "fp6: the quantization method is not registered: fp6_compile is tested with vLLM 0.32, here is none"
        in caplog.text
    )

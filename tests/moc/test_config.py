"""These tests are about the settings of attention: what is refused, and how they are stored."""

import json
from dataclasses import fields

import pytest
from hypothesis import given

import moc
from moc.errors import UserError
from tests.strategies import configs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"own_anchor": "clip"}, "own_anchor='clip'.*shot, chunk, none"),
        ({"text_anchor": "own"}, "text_anchor='own'.*all, global_and_own, none"),
        ({"descriptor": "rope"}, "descriptor='rope'.*post_rope, pre_rope"),
        ({"top_k": -1}, "top_k=-1.*at least 0"),
        ({"chunk_tokens": 0}, "chunk_tokens=0.*at least 1"),
        ({"drop_in_max": -1}, "drop_in_max=-1.*at least 0"),
        ({"drop_in_rate": -0.5}, "drop_in_rate=-0.5.*at least 0"),
        ({"drop_off_max": 1.5}, r"drop_off_max=1.5.*\[0, 1\]"),
        ({"drop_off_max": -0.1}, r"drop_off_max=-0.1.*\[0, 1\]"),
        ({"drop_off_max": float("nan")}, r"drop_off_max=nan"),
        ({"drop_in_rate": float("nan")}, r"drop_in_rate=nan"),
        ({"drop_in_rate": float("inf")}, r"drop_in_rate=inf"),
        ({"top_k": "5"}, "top_k='5' must be a whole number"),
        ({"top_k": 2.5}, r"top_k=2\.5 must be a whole number"),
        ({"top_k": True}, "top_k=True must be a whole number"),
        ({"chunk_tokens": None}, "chunk_tokens=None must be a whole number"),
        ({"drop_in_rate": "1"}, "drop_in_rate='1' must be a number"),
        ({"drop_off_max": False}, "drop_off_max=False must be a number"),
        ({"causal": 1}, "causal=1 must be true or false"),
        ({"own_anchor": None}, "own_anchor=None is not one of"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        moc.MoCConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "cuda"}, "execution.backend='cuda'.*auto, reference, torch, triton"),
        ({"dense_kernel": None}, "execution.dense_kernel=None must be a name"),
        ({"deterministic": 1}, "execution.deterministic=1 must be true or false"),
    ],
)
def test_bad_ways_to_compute_are_refused(values, message):
    with pytest.raises(moc.errors.UserError, match=message):
        moc.Execution(**values)


@given(configs())
def test_settings_survive_plain_data_and_a_file(tmp_path_factory, config):
    assert moc.MoCConfig.from_dict(config.to_dict()) == config
    assert all(type(value) in (bool, int, float, str) for value in config.to_dict().values())
    folder = tmp_path_factory.mktemp("model")
    config.save(folder)
    assert moc.MoCConfig.load(folder) == config


def test_files_of_earlier_versions_open(tmp_path):
    """They also said how attention was computed, and the model's gap at cuts; sub-chunks were called parts."""
    config = moc.MoCConfig(top_k=3, descriptor_subchunks=4)
    more = {"backend": "triton", "dense_kernel": "fa3", "deterministic": True, "cut_gap": 2.0}
    more |= {"descriptor_parts": 4}
    stored = {name: value for name, value in config.to_dict().items() if name != "descriptor_subchunks"} | more
    (tmp_path / "moc.json").write_text(json.dumps(stored))
    assert moc.MoCConfig.load(tmp_path) == config
    config.save(tmp_path)
    assert not more.keys() & json.loads((tmp_path / "moc.json").read_text()).keys()


def test_every_setting_is_explained():
    explained = {name.strip() for line in moc.MoCConfig.__doc__.splitlines() for name in line.split(":")[0].split(",")}
    assert {field.name for field in fields(moc.MoCConfig)} <= explained


def test_unknown_settings_are_refused():
    with pytest.raises(UserError, match=r"MoC.*topk"):
        moc.MoCConfig.from_dict({"topk": 3})


@pytest.mark.parametrize("text", ['{"top_k": "5"}', '{"topk": 5}', "[5]", '{"top_k": 5'])
def test_a_bad_file_of_settings_is_named(tmp_path, text):
    (tmp_path / "moc.json").write_text(text)
    with pytest.raises(UserError, match=r"moc\.json: "):
        moc.MoCConfig.load(tmp_path)


def test_settings_are_frozen_and_take_plain_strings():
    config = moc.MoCConfig(own_anchor="chunk")
    assert config == moc.MoCConfig(own_anchor=moc.OwnAnchor.chunk)
    with pytest.raises(AttributeError):
        config.top_k = 3


def test_the_first_layers_may_be_dense():
    config = moc.MoCConfig(top_k=3, dense_layers=2)
    assert [config.at_layer(layer).dense for layer in range(4)] == [True, True, False, False]
    assert config.at_layer(2) == config
    with pytest.raises(UserError, match="dense_layers=-1"):
        moc.MoCConfig(dense_layers=-1)

"""`InfiniConfig`: what it refuses and how it says so, its round trips, and the geometry of the window."""

import dataclasses
import json

import pytest

from infini_hf import InfiniConfig, __version__

INVALID = [
    ({"segment_length": 0}, "segment_length=0: must be at least 1"),
    ({"segment_length": -1}, "segment_length=-1: must be at least 1"),
    ({"segment_length": 2.5}, "segment_length=2.5: must be a whole number, not a float"),
    ({"segment_length": True}, "segment_length=True: must be a whole number, not a bool"),
    ({"segment_length": "8"}, "segment_length='8': must be a whole number, not a str"),
    ({"segment_length": None}, "segment_length=None: must be a whole number, not a NoneType"),
    ({"memory_update": "hebb"}, "memory_update='hebb': must be one of 'linear', 'delta'"),
    ({"memory_update": None}, "memory_update=None: must be one of 'linear', 'delta'"),
    ({"feature_map": "relu"}, "feature_map='relu': must be one of 'elu', 'exp', 'softmax'"),
    ({"gate": "relu"}, "gate='relu': must be one of 'tanh', 'sigmoid'"),
    ({"segment_length": 8, "overlap": 9}, "overlap=9: must be at most segment_length=8"),
    ({"overlap": -1}, "overlap=-1: must be at least 0"),
    ({"overlap": 0.5}, "overlap=0.5: must be a whole number, not a float"),
    ({"segment_length": 8, "sink_tokens": 9}, "sink_tokens=9: must be at most segment_length=8"),
    ({"sink_tokens": -1}, "sink_tokens=-1: must be at least 0"),
    ({"sink_tokens": False}, "sink_tokens=False: must be a whole number, not a bool"),
    ({"layers": 3}, "layers=3: must be a list of layer indices, or None for all"),
    ({"layers": "01"}, "layers='01': must be a list of layer indices, or None for all"),
    ({"layers": []}, "layers=[]: names no layer; give at least one index, or None for all"),
    ({"layers": [0, -1]}, "layers=[0, -1]: -1 is not a layer index; count from 0"),
    ({"layers": [0, 1.0]}, "layers=[0, 1.0]: 1.0 is not a layer index; count from 0"),
    ({"layers": [True]}, "layers=[True]: True is not a layer index; count from 0"),
    ({"layers": [1, 1]}, "layers=[1, 1]: names a layer twice"),
]
# Every field away from its default.
FULL = InfiniConfig(
    segment_length=16,
    memory_update="delta",
    feature_map="exp",
    gate="sigmoid",
    overlap=16,
    sink_tokens=4,
    layers=[1, 3],
)


@pytest.mark.parametrize(("values", "message"), INVALID, ids=[message for _, message in INVALID])
def test_a_bad_value_is_refused_by_name(values, message):
    with pytest.raises(ValueError) as error:
        InfiniConfig(**values)
    assert str(error.value) == message


def test_the_defaults_are_the_papers():
    config = InfiniConfig()
    assert (config.segment_length, config.memory_update, config.feature_map) == (2048, "linear", "elu")
    assert (config.gate, config.overlap, config.sink_tokens, config.layers) == ("tanh", 0, 0, None)


def test_the_ends_of_the_ranges_are_allowed():
    config = InfiniConfig(segment_length=1, overlap=1, sink_tokens=1, layers=[0])
    assert (config.overlap, config.sink_tokens) == (1, 1)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        InfiniConfig().segment_length = 8


def test_layers_are_sorted_and_the_callers_list_stays():
    layers = [3, 1]
    assert InfiniConfig(layers=layers).layers == InfiniConfig(layers=(1, 3)).layers == [1, 3]
    assert layers == [3, 1]


@pytest.mark.parametrize("config", [InfiniConfig(), FULL], ids=["defaults", "full"])
def test_a_round_trip_gives_an_equal_config(config):
    values = config.to_dict()
    assert values["version"] == __version__
    assert set(values) == {field.name for field in dataclasses.fields(InfiniConfig)} | {"version"}
    before = dict(values)
    assert InfiniConfig.from_dict(values) == config
    assert values == before
    assert InfiniConfig.from_dict(json.loads(json.dumps(values))) == config


def test_full_has_no_default_left():
    """Otherwise the round trip above could lose a field and find its default again."""
    defaults = dataclasses.asdict(InfiniConfig())
    assert all(value != defaults[name] for name, value in dataclasses.asdict(FULL).items())


def test_a_dict_without_a_version_or_some_fields_is_read():
    assert InfiniConfig.from_dict({"segment_length": 8}) == InfiniConfig(segment_length=8)


def test_unknown_keys_are_refused_with_both_versions():
    with pytest.raises(ValueError) as error:
        InfiniConfig.from_dict({"segment_length": 8, "zeta": 1, "decay": 0.5, "version": "9.9"})
    assert str(error.value) == (
        "infini_attention has unknown keys ['decay', 'zeta']: it was written by version 9.9, "
        f"this is {__version__}; install that version, or remove the keys"
    )


def test_a_bad_value_in_a_dict_is_refused_too():
    with pytest.raises(ValueError, match=r"^overlap=9: must be at most segment_length=8$"):
        InfiniConfig.from_dict({"segment_length": 8, "overlap": 9})


GEOMETRIES = [(8, 0, 0), (8, 3, 0), (8, 0, 2), (8, 3, 2), (8, 8, 1), (8, 8, 8), (8, 6, 6), (1, 1, 1), (1, 0, 0)]


@pytest.mark.parametrize(("length", "overlap", "sinks"), GEOMETRIES)
def test_the_window_holds_sinks_overlap_and_open_segment_each_once(length, overlap, sinks):
    """Counted as a set of tokens, for every number of tokens read over five segments."""
    config = InfiniConfig(segment_length=length, overlap=overlap, sink_tokens=sinks)
    longest = 0
    for seen in range(5 * length + 1):
        start = seen // length * length
        carried = (set(range(sinks)) | set(range(start - overlap, start))) & set(range(start))
        assert config.carried_length(seen // length) == len(carried)
        assert config.window_length(seen) == len(carried) + seen - start
        # What the last query of this segment meets: everything carried and the whole segment.
        longest = max(longest, len(carried) + length)
    assert config.longest_window == longest

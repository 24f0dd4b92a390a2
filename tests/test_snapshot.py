"""Memory snapshots: read today, go on tomorrow with the same numbers, and never with another model's memory."""

import copy
import gc
import os
import time

import pytest
import torch
from models import build, build_patched, gate_parameters, open_gates, random_ids
from peft import LoraConfig, get_peft_model
from reading import assert_close, assert_same_state, read, state_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import GenerationConfig

from infini_hf import InfiniCache, generate, patch_model, prefill, score, unpatch_model
from infini_hf.snapshot import FILE_NAME, LEFT_OVER
from infini_hf.static_cache import StaticInfiniCache

SEGMENT = 8
OPTIONS = {"segment_length": SEGMENT, "memory_update": "delta", "overlap": 3, "sink_tokens": 2}


def make(family="llama", **overrides):
    model = build_patched(family, overrides=overrides, **OPTIONS)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


# The last row is shorter than a sliding window, so that padding is still in sight.
LENGTHS = (4 * SEGMENT + 3, 2 * SEGMENT, 2)


def ragged(lengths=LENGTHS):
    """A left-padded batch with its mask."""
    width = max(lengths)
    mask = torch.stack([F.pad(torch.ones(n, dtype=torch.long), (width - n, 0)) for n in lengths])
    return random_ids(len(lengths), width) * mask, mask


@pytest.fixture
def llama():
    return make()


@pytest.fixture
def saved(llama, tmp_path):
    """A folder with a snapshot of `llama`."""
    ids, mask = ragged()
    prefill(llama, ids, attention_mask=mask, progress=False).save_pretrained(tmp_path / "book")
    return tmp_path / "book"


def rewrite(folder, change):
    """Write the snapshot again after `change(tensors, metadata)`."""
    with safe_open(folder / FILE_NAME, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, folder / FILE_NAME, metadata=metadata)


def save_and_load(cache, folder, model):
    cache.save_pretrained(folder)
    return InfiniCache.from_pretrained(folder, model=model)


# Round trips.


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("padded", [False, True])
def test_reading_goes_on_with_the_same_numbers(family, padded, tmp_path):
    model = make(family)
    ids, mask = ragged()
    mask = mask if padded else None
    cache = prefill(model, ids, attention_mask=mask, progress=False)
    cache.notes = {"title": "a book", "pages": [1, 2]}
    cache.save_pretrained(tmp_path)
    loaded = InfiniCache.from_pretrained(tmp_path, model=model)
    assert loaded.notes == cache.notes
    assert_same_state(loaded, cache, tolerance=0)
    following = random_ids(3, 3 * SEGMENT + 2, seed=1)
    ours, theirs = (score(model, following, cache=copy.copy(one), progress=False) for one in (loaded, cache))
    assert_close(ours, theirs, 1e-6, "nll")
    answers = [
        generate(model, following[:, :3], cache=one, max_new_tokens=3 * SEGMENT, do_sample=False)
        for one in (loaded, cache)
    ]
    assert torch.equal(*answers)
    assert_same_state(loaded, cache, tolerance=1e-6)


def test_a_snapshot_serves_another_instance_with_the_same_weights(llama, saved):
    other = make()
    loaded = InfiniCache.from_pretrained(saved, model=other)
    ids, mask = ragged()
    assert_same_state(loaded, prefill(other, ids, attention_mask=mask, progress=False), tolerance=0)


def test_a_loaded_snapshot_can_be_saved_again(llama, saved, tmp_path):
    loaded = InfiniCache.from_pretrained(saved, model=llama)
    loaded.save_pretrained(tmp_path / "copy")
    again = InfiniCache.from_pretrained(tmp_path / "copy", model=llama)
    assert_same_state(again, loaded, tolerance=0)


def test_a_copy_has_notes_of_its_own(llama):
    cache = prefill(llama, random_ids(1, 9), progress=False)
    cache.notes["pages"] = [1]
    static = StaticInfiniCache.from_cache(cache, llama)
    for twin in (copy.copy(cache), copy.deepcopy(cache), static, static.to_infini_cache()):
        twin.notes["pages"].append(2)
        twin.notes["title"] = "another"
    assert cache.notes == {"pages": [1]}
    # A broken chunk is undone; what the reader noted of it is not.
    before, notes = copy.copy(cache), cache.notes
    notes["pages"].append(2)
    cache.restore(before)
    assert cache.notes is notes


def test_bfloat16_states_come_back_bit_equal(tmp_path):
    model = make().to(torch.bfloat16)
    cache = prefill(model, random_ids(2, 21), progress=False)
    cache.save_pretrained(tmp_path)
    loaded = InfiniCache.from_pretrained(tmp_path, model=model)
    for (name, ours), (_, theirs) in zip(state_of(loaded), state_of(cache), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


def test_saving_changes_nothing_and_replaces_the_old_file(llama, tmp_path):
    cache = prefill(llama, random_ids(2, 21), progress=False)
    before = copy.copy(cache)
    cache.save_pretrained(tmp_path)
    assert_same_state(cache, before, tolerance=0)
    prefill(llama, random_ids(2, 9, seed=1), cache=cache, progress=False)
    cache.save_pretrained(tmp_path)
    assert_same_state(InfiniCache.from_pretrained(tmp_path, model=llama), cache, tolerance=0)
    assert os.listdir(tmp_path) == [FILE_NAME]


# Other models.


def change_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3


def change_gate(model):
    with torch.no_grad():
        gate_parameters(model)["model.layers.0.self_attn.memory_gate.bias"][2] += 1e-3


def swap_two_weights(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]].clone()


def flip_two_signs(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        # Both are the top bit of a 64-bit word, where two flips cancel in a plain sum.
        weight[0, [1, 3]] *= -1


def change_dtype(model):
    model.to(torch.float16)


@pytest.mark.parametrize("change", [change_weight, change_gate, swap_two_weights, flip_two_signs, change_dtype])
def test_other_weights_are_refused(llama, saved, change):
    change(llama)
    with pytest.raises(ValueError, match="other weights, gates or adapters"):
        InfiniCache.from_pretrained(saved, model=llama)


@pytest.mark.parametrize(
    "overrides", [{"rope_theta": 5_000.0}, {"rms_norm_eps": 1e-3}, {"num_hidden_layers": 3}], ids=str
)
def test_another_config_is_refused(saved, overrides):
    with pytest.raises(ValueError, match="another model"):
        InfiniCache.from_pretrained(saved, model=make(**overrides))


def test_another_family_is_refused(saved):
    with pytest.raises(ValueError, match="another model"):
        InfiniCache.from_pretrained(saved, model=make("qwen2"))


@pytest.mark.parametrize(
    "option", [{"segment_length": 9}, {"memory_update": "linear"}, {"overlap": 4}, {"layers": [0]}], ids=str
)
def test_another_patch_is_refused(saved, option):
    with pytest.raises(ValueError, match="another patch"):
        InfiniCache.from_pretrained(saved, model=build_patched(**{**OPTIONS, **option}))


def test_models_that_are_not_patched_are_refused(llama, saved):
    with pytest.raises(ValueError, match="patch"):
        InfiniCache.from_pretrained(saved, model=unpatch_model(llama))


def test_what_does_not_change_the_numbers_is_not_another_model(llama, saved):
    """The name of the checkpoint, `use_cache` and the backend may differ between today and tomorrow."""
    llama.config.use_cache = False
    llama.config._name_or_path = "elsewhere"
    llama.config.pad_token_id = 5
    llama.set_attn_implementation("sdpa")
    llama.train()
    assert InfiniCache.from_pretrained(saved, model=llama).seen == LENGTHS


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path):
    model = build_patched("llama", segment_length=8)
    for name, age in (("old", 2 * LEFT_OVER), ("young", 0)):
        partial = tmp_path / f".memory.safetensors.{name}"
        partial.write_bytes(b"half a file")
        os.utime(partial, (time.time() - age,) * 2)
    prefill(model, random_ids(1, 20), progress=False).save_pretrained(tmp_path)
    # The young one may be what another process is writing.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".memory.safetensors.young", "memory.safetensors"]


def test_a_lora_switched_off_or_changed_is_another_model(llama, tmp_path):
    peft_model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    open_gates(llama)
    ids = random_ids(2, 21)
    cache = prefill(peft_model, ids, progress=False)
    cache.save_pretrained(tmp_path)
    loaded = InfiniCache.from_pretrained(tmp_path, model=peft_model)
    assert_same_state(loaded, cache, tolerance=0)
    with peft_model.disable_adapter(), pytest.raises(ValueError, match="adapters"):
        InfiniCache.from_pretrained(tmp_path, model=peft_model)
    with pytest.raises(ValueError, match="weights"):
        InfiniCache.from_pretrained(tmp_path, model=make())
    layer = llama.model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    with pytest.raises(ValueError, match="adapters"):
        InfiniCache.from_pretrained(tmp_path, model=peft_model)
    layer.scaling["default"] /= 2
    InfiniCache.from_pretrained(tmp_path, model=peft_model)
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="adapters"):
        InfiniCache.from_pretrained(tmp_path, model=peft_model)


def test_a_merged_lora_is_another_model_than_the_base(llama, saved):
    peft_model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="weights"):
        InfiniCache.from_pretrained(saved, model=peft_model.merge_and_unload())


def test_a_deep_copy_can_be_saved(llama, tmp_path):
    cache = copy.deepcopy(prefill(llama, random_ids(2, 21), progress=False))
    cache.save_pretrained(tmp_path)
    assert_same_state(InfiniCache.from_pretrained(tmp_path, model=llama), cache, tolerance=0)


# Damage.


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(llama, saved, share):
    data = (saved / FILE_NAME).read_bytes()
    (saved / FILE_NAME).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"memory\.safetensors.*damaged"):
        InfiniCache.from_pretrained(saved, model=llama)


def test_a_flipped_bit_in_any_tensor_is_noticed(llama, saved):
    data = (saved / FILE_NAME).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in range(header, len(data), (len(data) - header) // 23):
        broken = bytearray(data)
        broken[place] ^= 1
        (saved / FILE_NAME).write_bytes(broken)
        with pytest.raises(ValueError, match=r"damaged|NaN"):
            InfiniCache.from_pretrained(saved, model=llama)


def test_a_flipped_bit_in_what_the_file_says_of_itself_is_noticed(llama, saved):
    """Tokens seen and columns move boundaries and positions: one digit off would be wrong numbers without a word."""
    for name, value in [("seen", "[34, 16, 2]"), ("columns", "34"), ("notes", '{"title": "another"}')]:
        original = (saved / FILE_NAME).read_bytes()
        rewrite(saved, lambda tensors, metadata, name=name, value=value: metadata.update({name: value}))
        with pytest.raises(ValueError, match="damaged"):
            InfiniCache.from_pretrained(saved, model=llama)
        (saved / FILE_NAME).write_bytes(original)


@pytest.mark.parametrize("name", ["format", "fingerprint", "seen", "columns", "lengths", "notes", "checksum"])
def test_a_file_that_lacks_a_field_is_refused(llama, saved, name):
    rewrite(saved, lambda tensors, metadata: metadata.pop(name))
    with pytest.raises(ValueError, match=r"memory\.safetensors"):
        InfiniCache.from_pretrained(saved, model=llama)


@pytest.mark.parametrize("name", ["layers.0.keys", "layers.1.memory"])
def test_a_file_that_lacks_a_tensor_is_refused(llama, saved, name):
    rewrite(saved, lambda tensors, metadata: tensors.pop(name))
    with pytest.raises(ValueError, match="damaged"):
        InfiniCache.from_pretrained(saved, model=llama)


def test_another_safetensors_file_is_refused(llama, tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match="no memory snapshot"):
        InfiniCache.from_pretrained(tmp_path, model=llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["memory", "memory_norm", "keys"])
def test_a_spoilt_memory_is_refused(llama, tmp_path, name, value):
    cache = prefill(llama, random_ids(2, 21), progress=False)
    layer = cache.layers[1]
    spoilt = getattr(layer, name).clone()
    spoilt[1, 0, 0] = value
    setattr(layer, name, spoilt)
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_and_load(cache, tmp_path, llama)


def test_a_missing_folder_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="no memory snapshot is there"):
        InfiniCache.from_pretrained(tmp_path / "nowhere", model=llama)


# What cannot be saved.


def test_an_empty_cache_is_not_saved(llama, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        InfiniCache(llama.config).save_pretrained(tmp_path / "book")
    assert not (tmp_path / "book").exists()


def test_an_interrupted_cache_is_not_saved(llama, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
    cache = InfiniCache(llama.config)
    with pytest.raises(KeyboardInterrupt):
        llama(random_ids(1, 20), past_key_values=cache)
    handle.remove()
    with pytest.raises(ValueError, match="interrupted"):
        cache.save_pretrained(tmp_path)


def test_a_cache_whose_model_is_gone_is_not_saved(tmp_path):
    cache = prefill(make(), random_ids(1, 20), progress=False)
    # A patched model refers to itself, so that counting references alone does not free it.
    gc.collect()
    with pytest.raises(ValueError, match="gone"):
        cache.save_pretrained(tmp_path)


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "infini_hf.snapshot.save_file"])
def test_a_crash_while_saving_leaves_the_old_file(llama, saved, monkeypatch, step):
    """A crash at any step leaves the old snapshot loadable and no partial file beside it."""
    cache = InfiniCache.from_pretrained(saved, model=llama)
    old = (saved / FILE_NAME).read_bytes()
    read(llama, random_ids(3, 9, seed=1), cache=cache)

    def crash(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, crash)
        with pytest.raises(OSError, match="no space"):
            cache.save_pretrained(saved)
    assert os.listdir(saved) == [FILE_NAME]
    assert (saved / FILE_NAME).read_bytes() == old
    cache.save_pretrained(saved)
    assert_same_state(InfiniCache.from_pretrained(saved, model=llama), cache, tolerance=0)


def test_a_stock_model_has_no_cache_to_save():
    with pytest.raises(ValueError, match="patch"):
        InfiniCache(build().config)
    assert patch_model(build()).config.infini_attention["segment_length"] == 2048

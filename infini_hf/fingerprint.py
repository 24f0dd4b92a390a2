"""What must be the same for a memory to make sense: the shape of a model, its patch, its weights and its adapters."""

import hashlib
import json

import torch
from accelerate.utils import align_module_device

# What decides, beside the weights, what a decoder of the supported families computes.
SHAPE = (
    "attention_bias attn_logit_softcapping head_dim hidden_act hidden_activation hidden_size intermediate_size "
    "layer_types max_position_embeddings mlp_bias num_attention_heads num_hidden_layers num_key_value_heads "
    "query_pre_attn_scalar rms_norm_eps rope_parameters sliding_window vocab_size"
).split()
ITEMS_AT_ONCE = 2**22


def fingerprint(decoder):
    """What must be the same for a memory to make sense: `{"model", "patch", "weights"}`, each a text."""
    config = decoder.config.to_dict()
    patch = {key: value for key, value in config.get("infini_attention", {}).items() if key != "version"}
    shape = {key: config[key] for key in SHAPE if key in config}
    return {
        "model": json.dumps({"model_type": config["model_type"], **shape}, sort_keys=True),
        "patch": json.dumps(patch, sort_keys=True),
        "weights": digest_weights(decoder),
    }


def check_fingerprint(path, theirs, ours):
    """Raise a sentence on the first difference."""
    if theirs["model"] != ours["model"]:
        was, now = json.loads(theirs["model"]), json.loads(ours["model"])
        changed = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
        differences = ", ".join(f"{key} {was.get(key)} there and {now.get(key)} here" for key in changed)
        raise ValueError(f"{path}: was written by another model ({differences})")
    if theirs["patch"] != ours["patch"]:
        raise ValueError(f"{path}: was written under another patch ({theirs['patch']}, this is {ours['patch']})")
    if theirs["weights"] != ours["weights"]:
        raise ValueError(
            f"{path}: was written by other weights, gates or adapters of this model, or in another dtype: load the "
            "ones that read the text (a LoRA switched off is another model; of a command, the same --adapter and "
            "--dtype), or read it again"
        )


def digest_text(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest_weights(decoder):
    """A digest of every parameter and buffer and of which adapters act, computed where the weights are."""
    lines = []
    for name, module in decoder.named_modules():
        # Frequencies that depend on the longest position met; the first ones stand beside them.
        moving = any(kind in str(vars(module).get("rope_type")) for kind in ("dynamic", "longrope"))
        with align_module_device(module):
            # At first both may be one tensor.
            buffers = module.named_buffers(recurse=False, remove_duplicate=not moving)
            for part, tensor in [*module.named_parameters(recurse=False), *buffers]:
                if moving and part.endswith("inv_freq") and "original" not in part:
                    continue
                lines.append((name, part, str(tensor.dtype), list(tensor.shape), digest_tensor(tensor.detach())))
        state = vars(module)
        if "merged_adapters" in state:
            # An adapter of PEFT: the same weights are another model when it is switched off.
            adapters = [state.get("_disable_adapters"), state.get("_active_adapter"), state["merged_adapters"]]
            # What scales its product is no tensor.
            adapters.append(sorted(state.get("scaling", {}).items()))
            lines.append((name, *map(str, adapters)))
    return digest_text(lines)


def digest_tensor(tensor):
    """A position-dependent sum of a tensor's bits, in wrapping 64-bit integers."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -data.numel() % 8)).view(torch.int64)
    total = 0
    for start in range(0, data.numel(), ITEMS_AT_ONCE):
        part = data[start : start + ITEMS_AT_ONCE]
        odd = torch.arange(start, start + part.numel(), device=part.device) * 2 + 1
        # The shift mixes high bits down, so that a sign that flips twice cannot cancel.
        total += int(((part ^ (part >> 29)) * odd).sum())
    return total % 2**64

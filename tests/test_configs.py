"""Every YAML under configs is one that its program takes, and its header tells the truth about launch and memory."""

import importlib.util
import math
import re
import shlex
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from models import build_patched, random_ids
from reading import read
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from infini_hf import InfiniTrainingArguments, patch_model
from infini_hf.assets import shipped
from infini_hf.attention import InfiniAttention
from infini_hf.cli.arguments import parse_arguments
from infini_hf.cli.memory_arguments import MemoryArguments
from infini_hf.cli.script_arguments import DocumentArguments, LoraArguments, ModelArguments

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.y*ml"))
LAUNCHERS = [path for path in FILES if path.parts[1] == "accelerate"]
RUNS = [path for path in FILES if path.parts[1] in ("pretrain", "lora", "eval")]
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# The config.json of the models that the files name, and how many parameters their model cards promise.
MODELS = {
    "meta-llama/Llama-3.2-1B": (
        1.24e9,
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
        },
    ),
    "meta-llama/Meta-Llama-3-8B": (
        8.03e9,
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "google/gemma-2b": (
        2.51e9,
        {
            "model_type": "gemma",
            "hidden_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 16384,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
        },
    ),
    "google/gemma-2-2b": (
        2.61e9,
        {
            "model_type": "gemma2",
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
        },
    ),
}
NAMED = [path for path in RUNS if yaml.safe_load((ROOT / path).read_text(encoding="utf-8")).get("model") in MODELS]

runs = pytest.mark.parametrize("path", RUNS, ids=str)
named = pytest.mark.parametrize("path", NAMED, ids=str)
launchers = pytest.mark.parametrize("path", LAUNCHERS, ids=str)


@cache
def script(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def argument_classes(name):
    """The dataclasses that a script is filled from."""
    return {
        "pretrain": lambda: (ModelArguments, DocumentArguments, InfiniTrainingArguments),
        "finetune_booksum": lambda: (
            ModelArguments,
            LoraArguments,
            script(name).PairArguments,
            InfiniTrainingArguments,
        ),
        "finetune_memory": lambda: (
            ModelArguments,
            LoraArguments,
            MemoryArguments,
            script(name).RowArguments,
            InfiniTrainingArguments,
        ),
        "fit_projections": lambda: (
            ModelArguments,
            MemoryArguments,
            script(name).FitArguments,
            script(name).FitSettings,
        ),
        "average_weights": lambda: (ModelArguments, script(name).AverageArguments),
        "pretrain_base": lambda: (script(name).BaseArguments, TrainingArguments),
        "summarize": lambda: (ModelArguments, script(name).SummaryArguments),
        "plot_perplexity": lambda: (script(name).PlotArguments,),
        "evaluate": lambda: (script(name).OptionalModel, script(name).EvaluationArguments),
        "benchmark": lambda: (script(name).BenchmarkSettings,),
    }[name]()


def header(path):
    """The lines of the comment that a file begins with, without their signs."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    count = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return [line[1:].strip() for line in lines[:count]]


def commands(path):
    """The commands in the header of a file, as lists of words."""
    text = "\n".join(header(path)).replace("\\\n", " ")
    found = re.findall(r"(?:python|accelerate launch) .*(?:--config|--task|SCRIPT).*", text)
    return [shlex.split(command) for command in found]


def after(words, option):
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def launch(path):
    """The script and the words behind it of the command that runs a file."""
    words = next(words for words in commands(path) if str(path) in after(words, "--config"))
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return Path(words[place]).stem, words[place + 1 :]


@cache
def parsed(path):
    """The filled dataclasses of a file, by name of the class."""
    name, words = launch(path)
    kinds = argument_classes(name)
    given = ["--config", str(ROOT / path)]
    given += ["--train_folder", "novels"] if "--train_folder" in words else []
    # Else bfloat16 asks for a GPU that has it.
    given += ["--use_cpu"] if any(issubclass(kind, TrainingArguments) for kind in kinds) else []
    return {type(part).__name__: part for part in parse_arguments(kinds, "", given)}


def values_of(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


# All of them.


def test_no_file_is_left_out():
    assert len(FILES) == len(LAUNCHERS) + len(RUNS), "a new folder of configs: say here which program takes them"
    assert Counter(path.parts[1] for path in FILES) >= Counter(accelerate=5, pretrain=11, lora=5, eval=4)
    for model in ("llama_3.2_1b", "llama_3_8b", "gemma_2b", "gemma_2_2b", "tiny_cpu"):
        for folder in ("pretrain", "lora"):
            assert Path("configs", folder, f"{model}.yaml") in FILES
    for path in RUNS:
        model = values_of(path).get("model", "")
        assert model in {"", *MODELS, *shipped()} or model.startswith("outputs/"), f"{path}: who is {model}?"
    assert {values_of(path)["model"] for path in NAMED} == set(MODELS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_header_says_how_to_launch_and_what_memory_that_takes(path):
    lines = header(path)
    assert all(len(line) <= 119 for line in (ROOT / path).read_text(encoding="utf-8").splitlines())
    assert any(line.startswith("Memory: ") for line in lines)
    option = "--config_file" if path in LAUNCHERS else "--config"
    assert any(str(path) in after(words, option) for words in commands(path))
    for words in commands(path):
        for name in [*after(words, "--config_file"), *after(words, "--config"), *words]:
            if name.startswith(("configs/", "scripts/")):
                assert (ROOT / name).is_file(), name
    for mentioned in re.findall(r"configs/\S+\.yaml", " ".join(lines)):
        assert (ROOT / mentioned).is_file(), mentioned


@runs
def test_options_in_the_header_are_options_of_the_script(path):
    for words in commands(path):
        place = next(index for index, word in enumerate(words) if word.endswith(".py"))
        kinds = argument_classes(Path(words[place]).stem)
        known = {"config", *(item.name for kind in kinds for item in fields(kind))}
        given = {word.removeprefix("--") for word in words[place + 1 :] if word.startswith("--")}
        assert given <= known


# Files for the scripts.


@runs
def test_the_script_of_a_file_takes_it(path):
    classes = parsed(path)
    filled = {item.name: part for part in classes.values() for item in fields(part)}
    for key, value in values_of(path).items():
        found = vars(filled[key])[key]
        if key == "report_to":
            assert (value, found) == ("none", [])
        else:
            assert found == (value if isinstance(value, (list, type(None))) else type(found)(value)), key


def test_runs_write_into_folders_of_their_own():
    folders = [values_of(path)["output_dir"] for path in RUNS if "output_dir" in values_of(path)]
    assert len(folders) == len(set(folders)) == sum(path.parts[1] != "eval" for path in RUNS)


@pytest.mark.parametrize("path", [path for path in NAMED if path.parts[1] == "pretrain"], ids=str)
def test_a_batch_is_as_large_as_the_paper_says(path):
    """64 rows of 8k tokens, with the processes of the launch file."""
    values = values_of(path)
    command = next(words for words in commands(path) if str(path) in after(words, "--config"))
    processes = values_of(after(command, "--config_file")[0])["num_processes"]
    assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * processes == 64
    assert values["segments_per_row"] * values["segment_length"] == 8192
    assert values["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    "name", ["pretrain", "finetune_booksum", "finetune_memory", "fit_projections", "summarize", "evaluate"]
)
def test_unknown_options_are_refused(name, tmp_path):
    kinds, file = argument_classes(name), tmp_path / "wrong.yaml"
    file.write_text("model: tiny-llama\nsegment_lenght: 128\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'segment_lenght' \(did you mean segment_length"):
        parse_arguments(kinds, "", ["--config", str(file)])
    file.write_text("model: tiny-llama\n", encoding="utf-8")
    required = {"pretrain": ["--train_source", "novels"], "summarize": ["--output", "said.jsonl"]}.get(name, [])
    parse_arguments(kinds, "", ["--config", str(file), *required])
    with pytest.raises(ValueError, match="segment_lenght"):
        parse_arguments(kinds, "", ["--config", str(file), *required, "--segment_lenght", "128"])


def test_a_key_of_an_old_transformers_is_refused_with_its_new_name(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("model: tiny-llama\nevaluation_strategy: steps\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation_strategy.*did you mean.*eval_strategy"):
        parse_arguments(argument_classes("pretrain"), "", ["--config", str(file)])


# The models that the files name, on the meta device.


@cache
def built(path):
    """The model of a file with its real shapes, without weights, patched and adapted as the file says."""
    classes = parsed(path)
    model_args = classes.get("ModelArguments") or classes["OptionalModel"]
    shape = dict(MODELS[model_args.model][1])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    patch_model(model, model_args.infini_config())
    return (classes["LoraArguments"].wrap(model) if "LoraArguments" in classes else model), parameters


def state_bytes(model):
    """Bytes of one memory state of one row: `(d, d)` and `(d,)` float32 for each KV head of a patched layer."""
    layers = [module for module in model.modules() if isinstance(module, InfiniAttention)]
    heads, size = model.config.num_key_value_heads, layers[0].head_dim
    return len(layers) * heads * (size**2 + size) * 4


def window_bytes(model, bytes_of_a_number):
    """Bytes of the keys and values that the sliding layers of one row carry from segment to segment."""
    config = model.config
    layers = list(vars(config).get("layer_types") or ()).count("sliding_attention")
    tokens = (vars(config).get("sliding_window") or 1) - 1
    return 2 * layers * tokens * config.num_key_value_heads * config.head_dim * bytes_of_a_number


def figures(path):
    """`{pattern: value in GB or MB}` of all that a header may say about memory."""
    model, parameters = built(path)
    values, state = values_of(path), state_bytes(model)
    rows = values.get("max_text_tokens", 0) + values.get("max_summary_tokens", 0)
    segments = math.ceil(rows / 2048)
    logits = 12 * model.config.vocab_size
    windows = window_bytes(model, 4 if values["dtype"] == "float32" else 2)
    return {
        r"NUMBER GB of weights, gradients and AdamW in float32": 16 * parameters / 1e9,
        r"over the 8 ranks of fsdp2.yaml \(NUMBER GB each": 16 * parameters / 8 / 1e9,
        r"NUMBER GB of RAM while it loads": 4 * parameters / 1e9,
        r"NUMBER GB for the (?:base|weights) in bfloat16": 2 * parameters / 1e9,
        r"NUMBER GB for the logits of one (?:segment|chunk of 2,048 tokens)": 2048 * logits / 1e9,
        r"NUMBER GB for those of full attention over 8,192 tokens": 8192 * logits / 1e9,
        r"NUMBER MB of memory state a segment and row": state / 1e6,
        rf"NUMBER MB for the states of {segments} segments": segments * state / 1e6,
        r"NUMBER MB for the memory": state / 1e6,
        r"NUMBER MB of the sliding layers' windows": windows / 1e6,
        rf"NUMBER GB for the windows of {segments} segments": segments * windows / 1e9,
    }


@named
def test_the_model_of_a_file_has_the_size_of_its_name(path):
    model, parameters = built(path)
    classes = parsed(path)
    name = (classes.get("ModelArguments") or classes["OptionalModel"]).model
    assert parameters == pytest.approx(MODELS[name][0], rel=0.01)
    gates = [p for key, p in model.named_parameters() if "memory_gate" in key and "original" not in key]
    layers = model.config.num_hidden_layers // (2 if model.config.model_type == "gemma2" else 1)
    assert [gate.numel() for gate in gates] == [model.config.num_attention_heads] * layers
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("path", [path for path in NAMED if path.parts[1] == "lora"], ids=str)
def test_lora_trains_the_adapters_and_the_gates_alone(path):
    model, _ = built(path)
    config, rank = model.config, values_of(path)["lora_r"]
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    one = rank * (2 * (config.hidden_size + queries) + 2 * (config.hidden_size + keys))
    patched = config.num_hidden_layers // (2 if config.model_type == "gemma2" else 1)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == config.num_hidden_layers * one + patched * config.num_attention_heads


@named
def test_memory_in_the_header_follows_from_the_shapes(path):
    text = " ".join(header(path))
    said = 0
    for pattern, value in figures(path).items():
        for number in re.findall(pattern.replace("NUMBER", r"(\d[\d.]*)"), text):
            decimals = len(number.partition(".")[2])
            assert abs(float(number) - value) <= 0.51 * 10**-decimals, f"{pattern}: {number} is {value:.4f}"
            said += 1
    assert said == len(re.findall(r"\d [GM]B", text)) > 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_state_of_a_row_is_as_large_as_the_arithmetic_says(family):
    model = build_patched(family, segment_length=8)
    _, cache = read(model, random_ids(1, 24))
    layers = cache.infini_layers.values()
    held = sum(layer.memory.nbytes + layer.memory_norm.nbytes for layer in layers)
    assert held == state_bytes(model)


# Files for accelerate.


@launchers
def test_accelerate_takes_the_file(path, monkeypatch):
    config = load_config_from_file(str(ROOT / path))
    assert isinstance(config, ClusterConfig)
    parser = launch_command_parser()
    options = {action.dest for action in parser._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= options, "accelerate passes over what it does not know"
    words = ["--config_file", str(ROOT / path), str(ROOT / "scripts" / "pretrain.py")]
    args, _, _ = _validate_launch_command(parser.parse_args(words))
    kind = path.stem
    assert (args.use_fsdp, args.multi_gpu) == (kind == "fsdp2", kind == "ddp")
    assert args.zero_stage == {"zero2": 2, "zero3": 3}.get(kind)
    assert args.use_deepspeed == kind.startswith("zero")
    assert args.num_processes == (1 if kind == "one_gpu" else 8)
    assert args.mixed_precision == "bf16"


def test_fsdp_is_the_second_and_leaves_recomputation_to_the_trainer(monkeypatch):
    path = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    words = ["--config_file", str(path), "--main_process_port", "0", "scripts/pretrain.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is False
    assert plugin.cpu_ram_efficient_loading is False


def test_no_file_checkpoints_activations_inside_layers():
    for path in FILES:
        flat = values_of(path) | values_of(path).get("fsdp_config", {})
        for key in ("gradient_checkpointing", "activation_checkpointing", "fsdp_activation_checkpointing"):
            assert not flat.get(key), f"{path}: {key}"

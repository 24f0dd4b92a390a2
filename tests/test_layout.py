"""The shape of the package: which module may import which, and the names that users rely on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import infini_hf

PACKAGE = Path(infini_hf.__file__).parent
# Bottom up; a module or subpackage imports from rows above its own, never from its own row or below.
ROWS = (
    "version assets data heap memory dilution sharding output_head collectives fast_paths",
    "windows retrieval_losses step_options fingerprint batch_columns",
    "config segments inputs call_arguments segment_step training_args local_attention memory_read",
    "gate generation_options",
    "layer_state memory_maps parameter_groups",
    "cache sequence_layer",
    "attention snapshot checkpoints sequence_parallel projections",
    "told_layers families lanes",
    "retrieval_supervision",
    "recall_supervision",
    "rope static_layer layer_fit supervision inner_padding",
    "static_cache",
    "static_attention",
    "hooks generation_cache",
    "patching",
    "auto",
    "streaming lora_base lora_targets",
    "lora_room",
    "callbacks lora calibration distillation trainer_checks resuming shared_rows told_rows",
    "trainer evaluation projection_fit",
    "model_card",
    "cli",
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row.split()}
# `cache.save_pretrained` reaches up to the module that knows the file format, when it is called.
LAZY_UPWARD = {("cache", "snapshot")}
PURE = ("memory.py", "memory_read.py", "memory_maps.py", "segments.py", "gate.py", "config.py", "collectives.py")
NAMES = {
    "AutoInfiniModelForCausalLM",
    "InfiniCache",
    "InfiniConfig",
    "__version__",
    "generate",
    "is_patched",
    "patch_model",
    "patched",
    "prefill",
    "score",
    "unpatch_model",
}
# Names of training, from the modules that define them.
TRAINING_NAMES = {"InfiniTrainer", "InfiniTrainingArguments"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def unit(path):
    """The module or subpackage, as named in `ROWS`, that a file or a dotted path belongs to."""
    return Path(path).parts[0].removesuffix(".py")


def imports(path):
    """`(dotted name, names taken from it, whether at module scope)` for every import of a file."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    inside = {node for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, (), node not in inside
        elif isinstance(node, ast.ImportFrom):
            base = ["infini_hf", *path.parent.parts][: len(path.parent.parts) + 2 - node.level] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])]), [a.name for a in node.names], node not in inside


def own_imports(path):
    """`(unit, whether at module scope)` for every import of this package by a file."""
    for module, names, at_top in imports(path):
        parts = module.split(".")
        if parts[0] == "infini_hf":
            for name in parts[1:2] or names:
                yield name, at_top


def test_every_module_has_its_place():
    units = {unit(path) for path in FILES} - {"__init__"}
    assert units <= set(RANK), f"new modules {sorted(units - set(RANK))}: give them a row in ROWS"
    assert len(FILES) > 15


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    own = unit(path)
    if own == "__init__":
        return
    for name, at_top in own_imports(path):
        if name == own:
            assert len(path.parts) > 1, f"{path} imports itself"
        elif at_top or (own, name) not in LAZY_UPWARD:
            assert RANK[name] < RANK[own], f"{path} imports {name}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_foreign_packages_stay_where_they_belong(path):
    for module, names, at_top in imports(path):
        root = module.split(".")[0]
        if root == "transformers":
            assert f"{unit(path)}.py" not in PURE, f"{path} knows transformers"
        if module.startswith("transformers.models."):
            llama = ("attention", ["rotate_half"], "transformers.models.llama.modeling_llama")
            assert unit(path) == "families" or (unit(path), names, module) == llama, f"{path} names a family"
        if root == "peft":
            assert unit(path) == "lora", f"{path} imports peft"
        if root == "datasets":
            assert not at_top, f"{path} imports datasets where it may not be installed"


def test_the_pure_modules_import_torch_and_the_standard_library_alone():
    for name in PURE:
        roots = {module.split(".")[0] for module, _, _ in imports(Path(name))} - {"infini_hf", "torch"}
        assert roots <= set(sys.stdlib_module_names), name


@pytest.mark.slow
def test_importing_the_package_needs_neither_datasets_nor_peft():
    """Some images have torch, transformers and no datasets; nothing happens at import either."""
    code = (
        "import sys; sys.modules['datasets'] = sys.modules['peft'] = None; import infini_hf; print(infini_hf.__all__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(infini_hf.__all__)


def test_the_public_names_are_pinned():
    assert set(infini_hf.__all__) - TRAINING_NAMES == NAMES
    for name in infini_hf.__all__:
        assert getattr(infini_hf, name) is not None


def test_public_names_carry_docstrings():
    for name in set(infini_hf.__all__) - {"__version__"}:
        assert getattr(infini_hf, name).__doc__, name

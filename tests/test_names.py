"""Names of models, adapters and files: what is mistyped is refused at once, what the hub may know is left to it."""

import pytest

from infini_hf.assets import resolve
from infini_hf.cli.common import load
from infini_hf.cli.names import check_target, find_adapter, find_file, find_model, find_source
from infini_hf.cli.script_arguments import ModelArguments
from infini_hf.evaluation.outputs import check_output


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A working folder with a run in `outputs`, and a model of another's in `meta-llama`."""
    for folder, file in (
        ("outputs/tiny-run/final", "config.json"),
        ("outputs/tiny-run/checkpoint-20", "adapter_config.json"),
        ("meta-llama/Llama-3.2-1B", "config.json"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders_shipped_checkpoints_and_names_of_the_hub_are_found(runs):
    assert find_model("outputs/tiny-run/final") == "outputs/tiny-run/final"
    assert find_model(runs / "meta-llama" / "Llama-3.2-1B") == str(runs / "meta-llama" / "Llama-3.2-1B")
    assert find_model("tiny-llama") == resolve("tiny-llama")
    # The hub is not asked here, and a folder of its owner's name keeps nothing from it.
    for name in ("google/gemma-2-2b", "meta-llama/Llama-3.2-3B"):
        assert find_model(name) == find_adapter(name) == name
    assert find_adapter("outputs/tiny-run/checkpoint-20") == "outputs/tiny-run/checkpoint-20"


def test_a_folder_of_the_users_goes_before_a_shipped_checkpoint(runs):
    (runs / "tiny-llama").mkdir()
    (runs / "tiny-llama" / "config.json").write_text("{}", encoding="utf-8")
    assert find_model("tiny-llama") == "tiny-llama"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tiny-lama",
            r"model 'tiny-lama': .* \(did you mean tiny-llama\b.*\?\); a model of the hub is named 'owner/name'",
        ),
        ("output", r"\(did you mean outputs\?\)"),
        ("Llama-3.2-1B", r"there is no such folder or shipped checkpoint \(.*tiny-llama.*\); a model of the hub"),
        ("outputs/tiny-rum", r"\(did you mean outputs/tiny-run\?\)"),
        ("outputs/tiny-run/finnal", r"\(did you mean outputs/tiny-run/final\?\)"),
        ("outpts/tiny-run/final", r"\(did you mean outputs\?\)"),
        ("./meta-llama/Llama-3.2-1b", r"\(did you mean meta-llama/Llama-3\.2-1B\?\)"),
        (
            "outputs/tiny-run",
            r"model 'outputs/tiny-run': holds no config.json; there is one in outputs/tiny-run/final",
        ),
        ("outputs/tiny-run/checkpoint-20", "it is an adapter, which goes on top of its base model"),
        ("outputs/tiny-run/final/config.json", "holds no config.json"),
    ],
)
def test_a_model_that_is_nowhere_is_refused_with_what_comes_near(runs, name, message):
    with pytest.raises(ValueError, match=message):
        find_model(name)


def test_an_adapter_that_is_nowhere_is_refused_before_its_base_is_loaded(runs):
    with pytest.raises(ValueError, match=r"adapter 'outputs/tiny-rum/final': .* \(did you mean outputs/tiny-run\?\)"):
        ModelArguments("google/gemma-2-2b").load("outputs/tiny-rum/final")
    with pytest.raises(
        ValueError, match=r"holds no adapter_config\.json; there is one in outputs/tiny-run/checkpoint"
    ):
        find_adapter("outputs/tiny-run")


def test_a_source_that_is_nowhere_is_refused_where_it_can_be_none_of_the_hub(runs):
    (runs / "books" / "train").mkdir(parents=True)
    (runs / "books" / "train" / "1.txt").write_text("A text.", encoding="utf-8")
    for name in ("books/train", "pg19", "deepmind/pg19", "meta-llama/texts"):
        assert find_source(name, "source") == name
    for name, message in (
        ("books/tran", r"train_source 'books/tran': there is no such file or folder \(did you mean books/train\?\)"),
        ("boks/train", r"\(did you mean books\?\)"),
        ("novels/train", "train_source 'novels/train': there is no such file or folder$"),
    ):
        with pytest.raises(ValueError, match=message):
            find_source(name, "train_source")


def test_a_file_that_is_nowhere_is_refused_with_what_comes_near(runs):
    assert find_file("outputs/tiny-run/final/config.json", "text").name == "config.json"
    with pytest.raises(ValueError, match=r"text outputs/tiny-run/final/confg\.json: there is no .*/config\.json\?"):
        find_file("outputs/tiny-run/final/confg.json", "text")
    with pytest.raises(ValueError, match="--config outputs: is a folder"):
        find_file("outputs", "--config")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(runs, monkeypatch):
    file = "outputs/tiny-run/final/config.json"
    for place in ("new", "outputs/new/memory", "outputs", runs / "memory"):
        check_target(place, "--memory ")
    with pytest.raises(ValueError, match=rf"--memory {file}: is a file; name a folder"):
        check_target(file, "--memory ")
    with pytest.raises(ValueError, match=rf"--memory {file}/memory: .*/config\.json is no folder; name a folder else"):
        check_target(f"{file}/memory", "--memory ")
    check_output("outputs/new/samples.jsonl")
    with pytest.raises(ValueError, match=r"output='outputs/.*': '.*/config\.json' is no folder; name a file else"):
        check_output(f"{file}/samples.jsonl")
    # Who may do everything may write there all the same.
    (runs / "outputs" / "there.jsonl").write_text("", encoding="utf-8")
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("outputs"))
    check_output("outputs/there.jsonl")
    with pytest.raises(ValueError, match="may not be written"):
        check_output("outputs/there.jsonl", taken=(".png",))
    with pytest.raises(ValueError, match=r"--memory outputs/new/memory: .*/outputs may not be written; name a folder"):
        check_target("outputs/new/memory", "--memory ")
    with pytest.raises(ValueError, match=r"output='outputs/new': '.*/outputs' may not be written; name a file else"):
        check_output("outputs/new")


@pytest.mark.parametrize("way", ["command", "script"])
def test_what_the_hub_says_is_said_with_the_name(way):
    with pytest.raises(OSError, match=r"^nobody/nothing: cannot be loaded \(HF_HUB_OFFLINE is set"):
        load("nobody/nothing", None, "float32", "cpu", 0) if way == "command" else ModelArguments(
            "nobody/nothing"
        ).load()

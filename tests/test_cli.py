"""The command line on the shipped checkpoint: it reads, keeps, goes on where it stopped, and answers."""

import re

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from infini_hf import AutoInfiniModelForCausalLM, InfiniCache, InfiniConfig, generate, prefill
from infini_hf.assets import resolve, shipped
from infini_hf.cli import ask as ask_module
from infini_hf.cli import common
from infini_hf.cli import main as main_module
from infini_hf.cli import read as read_module
from infini_hf.cli.adapters import load_adapted
from infini_hf.cli.main import app, main
from infini_hf.lora import lora_config
from infini_hf.snapshot import read_dtype, read_patch

TEXT = "It was a cold morning, and the old lady had not yet come down to her breakfast. " * 30
OTHER = "The coach stood before the door, and nobody could say where the driver was. " * 20
PATCH = ["--segment-length", "128", "--overlap", "16", "--sink-tokens", "2"]
EXACT = ["--dtype", "float32", "--threads", "1"]


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def memory(tmp_path):
    return tmp_path / "memory"


def reference(*texts):
    """Model, tokenizer and cache of the texts read in one go."""
    config = InfiniConfig(segment_length=128, overlap=16, sink_tokens=2)
    model = AutoInfiniModelForCausalLM.from_pretrained(
        resolve("tiny-llama"), infini_config=config, dtype="float32"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llama"))
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    return model, tokenizer, prefill(model, torch.cat(ids, dim=1))


def assert_same_state(ours, theirs):
    assert ours.seen == theirs.seen
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for name in a.TENSORS:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-4)


def test_read_and_ask_are_prefill_and_generate(run, book, memory):
    assert run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT).exit_code == 0
    model, tokenizer, cache = reference(TEXT)
    assert_same_state(InfiniCache.from_pretrained(memory, model=model), cache)
    answer = run("ask", "tiny-llama", "The old lady", "--memory", memory, "--max-new-tokens", "8", *EXACT)
    assert answer.exit_code == 0
    ids = tokenizer("The old lady", return_tensors="pt")["input_ids"]
    expected = generate(model, ids, cache=InfiniCache.from_pretrained(memory, model=model), max_new_tokens=8)
    assert tokenizer.decode(expected[0]).strip() in answer.output


def test_what_is_read_with_an_adapter_is_asked_with_it(run, book, memory, tmp_path):
    options = {"infini_config": InfiniConfig(segment_length=64, overlap=8), "dtype": "float32"}
    base = AutoInfiniModelForCausalLM.from_pretrained(resolve("tiny-llama"), **options)
    model = get_peft_model(base, lora_config(base, r=2, init_lora_weights=False, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, gates in model.named_parameters():
            if "memory_gate" in name:
                gates.fill_(0.3)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().eval()
    adapter = ["--adapter", tmp_path / "adapter"]
    done = run("read", "tiny-llama", book, "--memory", memory, *adapter, *EXACT)
    assert done.exit_code == 0
    # Its gates are open.
    assert "note" not in done.output
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-llama"))
    cache = prefill(merged, tokenizer(TEXT, return_tensors="pt")["input_ids"])
    assert_same_state(InfiniCache.from_pretrained(memory, model=merged), cache)
    assert run("read", "tiny-llama", book, "--memory", memory, *adapter, *EXACT).output.startswith("book.txt: read")
    question = ["ask", "tiny-llama", "The old lady", "--memory", memory, "--max-new-tokens", "8", *EXACT]
    ids = tokenizer("The old lady", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(generate(merged, ids, cache=cache, max_new_tokens=8)[0]).strip()
    assert expected in run(*question, *adapter).output
    # The base alone would read it as it was not written.
    with pytest.raises(ValueError, match="other weights, gates or adapters"):
        run(*question)
    with pytest.raises(ValueError, match="was trained with 64, and an adapter brings its own patch"):
        run("read", "tiny-llama", book, "--memory", tmp_path / "m", *adapter, "--segment-length", "32")
    with pytest.raises(ValueError, match="adapter 'adaptor': there is no such folder"):
        run(*question, "--adapter", "adaptor")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_shared_weight_is_not_merged(target, tmp_path):
    base = AutoInfiniModelForCausalLM.from_pretrained(resolve("tiny-llama"), dtype="float32")
    options = {"init_lora_weights": False, "target_modules": ["q_proj", target]}
    get_peft_model(base, lora_config(base, r=2, **options)).save_pretrained(tmp_path)
    assert load_adapted(resolve("tiny-llama"), str(tmp_path)).peft_config
    with pytest.raises(ValueError, match=rf"adapter '.*': changes {target}, and embed_tokens and lm_head .* share"):
        load_adapted(resolve("tiny-llama"), str(tmp_path), merge=True)


def test_asking_leaves_the_snapshot_unless_told_to_save(run, book, memory):
    run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT)
    before = (memory / "memory.safetensors").read_bytes()
    question = ["ask", "tiny-llama", "And then", "--memory", memory, "--max-new-tokens", "4", *EXACT]
    run(*question)
    assert (memory / "memory.safetensors").read_bytes() == before
    run(*question, "--save")
    assert (memory / "memory.safetensors").read_bytes() != before


def test_a_model_whose_gates_are_all_at_zero_is_said_to_read_no_memory(run, book, tmp_path):
    # The base has gates at zero; with the shipped memory nothing is said.
    for model, noted in (("tiny-llama", True), ("tiny-llama-infini", False)):
        folder = tmp_path / model
        for done in (
            run("read", model, book, "--memory", folder, *EXACT),
            run("ask", model, "The", "--memory", folder, "--max-new-tokens", "1", "--threads", "1"),
        ):
            assert done.exit_code == 0
            assert ("all memory gates of this model are at zero" in done.stderr) is noted


def test_a_file_read_already_is_skipped_and_a_new_one_follows(run, book, memory, tmp_path):
    run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT)
    other = tmp_path / "other.txt"
    other.write_text(OTHER, encoding="utf-8")
    again = run("read", "tiny-llama", book, other, "--memory", memory, *EXACT)
    assert "read already" in again.output
    model, _, cache = reference(TEXT, OTHER)
    assert_same_state(InfiniCache.from_pretrained(memory, model=model), cache)


def test_a_text_that_follows_a_memory_made_elsewhere_does_not_begin_it(run, book, memory, monkeypatch):
    # The cache knows its model while there is one.
    _model, _, cache = reference(OTHER)
    cache.save_pretrained(memory)
    begun, encode = [], read_module.encode
    monkeypatch.setattr(read_module, "encode", lambda *args, first: begun.append(first) or encode(*args, first=first))
    run("read", "tiny-llama", book, "--memory", memory, *EXACT)
    assert begun == [False]


def test_interrupted_reading_is_saved_and_goes_on(run, book, memory, monkeypatch):
    calls, stock = [], read_module.prefill

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(read_module, "prefill", interrupted)
    stopped = run("read", "tiny-llama", book, "--memory", memory, "--chunk-size", "100", *PATCH, *EXACT)
    assert stopped.exit_code == 130
    assert "stopped after 200 tokens" in stopped.output
    model, _, cache = reference(TEXT)
    assert InfiniCache.from_pretrained(memory, model=model).seen == (200,)
    assert run("read", "tiny-llama", book, "--memory", memory, *EXACT).exit_code == 0
    assert_same_state(InfiniCache.from_pretrained(memory, model=model), cache)


def test_reading_goes_on_with_the_same_ids_after_a_question_is_kept(run, book, memory, monkeypatch):
    """With a tokenizer that begins a text itself: its token was left out then, and all others moved by one."""
    stock, encode, read = read_module.prefill, read_module.encode, []

    def beginning(tokenizer, text, first=True):
        ids = encode(tokenizer, text, first=first)
        return torch.cat([ids.new_tensor([[tokenizer.eos_token_id]]), ids], dim=1) if first else ids

    def interrupted(model, ids, **kwargs):
        if kwargs["cache"].seen == (200,):
            raise KeyboardInterrupt
        read.extend(ids[0].tolist())
        return stock(model, ids, **kwargs)

    monkeypatch.setattr(read_module, "encode", beginning)
    monkeypatch.setattr(read_module, "prefill", interrupted)
    run("read", "tiny-llama", book, "--memory", memory, "--chunk-size", "100", *PATCH, *EXACT)
    run("ask", "tiny-llama", "And then", "--memory", memory, "--max-new-tokens", "4", "--save", *EXACT)
    assert run("read", "tiny-llama", book, "--memory", memory, *EXACT).exit_code == 0
    assert read == beginning(AutoTokenizer.from_pretrained(resolve("tiny-llama")), TEXT)[0].tolist()


def test_another_file_is_refused_while_one_is_unfinished(run, book, memory, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    stock = read_module.prefill
    monkeypatch.setattr(read_module, "prefill", lambda *a, **k: stop() if k["cache"].seen else stock(*a, **k))
    run("read", "tiny-llama", book, "--memory", memory, "--chunk-size", "64", *PATCH, *EXACT)
    other = tmp_path / "other.txt"
    other.write_text(OTHER, encoding="utf-8")
    with pytest.raises(ValueError, match=r"in the middle of book\.txt"):
        run("read", "tiny-llama", other, "--memory", memory, *EXACT)


def test_a_memory_is_gone_on_with_in_its_own_dtype(run, book, memory):
    run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT)
    question = ("ask", "tiny-llama", "And then", "--memory", memory, "--max-new-tokens", "4")
    assert run(*question, "--threads", "1").exit_code == 0
    assert run("read", "tiny-llama", book, "--memory", memory, "--threads", "1").exit_code == 0


def test_a_file_in_the_place_of_the_memory_and_a_device_that_is_not_there_are_refused_at_once(run, book):
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run("read", "tiny-llama", book, "--memory", book)
    with pytest.raises(ValueError, match="--device nonsense: is not to be had here"):
        run("read", "tiny-llama", book, "--memory", book.parent / "memory", "--device", "nonsense")


def test_a_dtype_that_is_none_is_refused_and_a_short_name_is_one(run, book, memory):
    with pytest.raises(ValueError, match="dtype='foo': must be one of 'auto', 'float32', 'bfloat16', 'float16'"):
        run("read", "tiny-llama", book, "--memory", memory, "--dtype", "foo")
    assert run("read", "tiny-llama", book, "--memory", memory, "--dtype", "bf16", "--threads", "1").exit_code == 0
    assert read_dtype(memory) == "bfloat16"


def test_other_options_than_those_of_the_memory_are_refused(run, book, memory):
    run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT)
    assert run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT).exit_code == 0
    with pytest.raises(ValueError, match="overlap=8: the memory was begun with 16"):
        run("read", "tiny-llama", book, "--memory", memory, "--overlap", "8", *EXACT)


def test_segments_fit_the_positions_of_the_checkpoint_by_default(run, book, memory):
    run("read", "tiny-llama", book, "--memory", memory, *EXACT)
    assert read_patch(memory).segment_length == 640


def test_demo_finds_the_key_with_the_memory_alone(run, book, memory):
    shown = run("demo", "--text", book, "--tokens", "6000", "--key", "80315", "--memory", memory, "--threads", "1")
    assert shown.exit_code == 0
    assert re.search(r"the memory +│ '80315': right", shown.output)
    assert re.search(r"the memory closed +│ .*: wrong", shown.output)
    name = resolve("tiny-llama-infini")
    model = AutoInfiniModelForCausalLM.from_pretrained(name, dtype="float32")
    assert InfiniCache.from_pretrained(memory, model=model).seen == (6000,)


@pytest.mark.parametrize(
    ("busy", "threads"), [([0.0, 3.0, 0.0, 1.0], 4), ([100.0, 0.0, 10.0, 100.0], 2), ([100.0] * 4, 1), ([0.0] * 64, 4)]
)
def test_threads_are_no_more_than_cores_that_are_idle(monkeypatch, busy, threads):
    monkeypatch.setattr(common.psutil, "cpu_percent", lambda interval, percpu: busy)
    monkeypatch.setattr(common.torch, "get_num_threads", lambda: 4)
    assert common.idle_threads() == threads


def test_threads_that_are_asked_for_are_taken(run, monkeypatch):
    taken = []
    monkeypatch.setattr(common, "idle_threads", lambda: 3)
    monkeypatch.setattr(common.torch, "set_num_threads", taken.append)
    for given in ([], ["--threads", 7]):
        run("demo", "--tokens", 256, *given)
    assert taken == [3, 7]


def test_demo_shows_no_more_tokens_than_it_read(run):
    """The last of the boundaries that it looks at rounds to 384."""
    shown = run("demo", "--tokens", "370", "--threads", "1")
    assert shown.exit_code == 0
    assert re.findall(r"^│ +(\d+) │", shown.output, re.MULTILINE) == ["64", "128", "192", "256", "320", "370"]


def test_demo_refuses_a_file_for_its_memory_before_it_reads(run, book, monkeypatch):
    monkeypatch.setattr("infini_hf.cli.demo.load", None)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        run("demo", "--memory", book)


def test_demo_leaves_a_memory_that_is_there_alone(run, book, memory, monkeypatch):
    run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT)
    before = (memory / "memory.safetensors").read_bytes()
    monkeypatch.setattr("infini_hf.cli.demo.load", None)
    with pytest.raises(ValueError, match="holds a memory already, which the demo would replace; name another"):
        run("demo", "--memory", memory)
    assert (memory / "memory.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        ("demo", "--threads", "-1"),
        ("demo", "--seed", "-1"),
        ("passkey", "tiny-llama", "--seed", "-1"),
        ("ask", "tiny-llama", "Who?", "--memory", "there", "--seed", "99999999999999999999"),
    ],
)
def test_numbers_that_torch_would_not_take_are_refused(run, options):
    assert run(*options).exit_code == 2


@pytest.mark.parametrize("length", ["inf", "nan", "0", "4q"])
def test_a_length_that_is_none_is_refused(run, length):
    with pytest.raises(ValueError, match=f"--lengths '{length}': give numbers of tokens"):
        run("passkey", "tiny-llama", "--lengths", length)


def test_a_window_without_room_for_a_segment_is_refused_by_what_was_given(run, book, memory):
    with pytest.raises(ValueError, match="overlap and sinks of 9,999 tokens: leave too little of the 640 positions"):
        run("read", "tiny-llama", book, "--memory", memory, "--overlap", "9999", *EXACT)


@pytest.mark.parametrize(("options", "message"), [(("--key", "abc"), "--key abc"), (("--tokens", "10"), "10")])
def test_demo_refuses_what_it_cannot_hide(run, options, message):
    if options[0] == "--key":
        with pytest.raises(ValueError, match=message):
            run("demo", *options)
    else:
        assert run("demo", *options).exit_code == 2


def test_refusals_are_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["infini-hf", "ask", "tiny-llama", "Who?", "--memory", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "no memory snapshot is there" in capsys.readouterr().err


def test_a_bug_is_no_refusal(monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(main_module, "app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_a_mistyped_model_is_refused_with_what_comes_near(run, book, memory):
    with pytest.raises(ValueError, match=r"model 'tiny-lama': .*\(did you mean tiny-llama"):
        run("read", "tiny-lama", book, "--memory", memory)


def test_a_question_that_is_interrupted_ends_with_one_line(run, book, memory, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT)
    monkeypatch.setattr(ask_module, "generate", stop)
    stopped = run("ask", "tiny-llama", "And then", "--memory", memory, *EXACT)
    assert stopped.exit_code == 130
    assert stopped.output.endswith("\nstopped\n")
    # Before anything was read.
    monkeypatch.setattr(read_module, "load", stop)
    stopped = run("read", "tiny-llama", book, "--memory", memory, *PATCH, *EXACT)
    assert stopped.exit_code == 130
    assert "stopped; the same command" in stopped.output


def test_help_names_the_commands_and_the_shipped_checkpoints(run):
    assert "tiny-llama" in shipped()
    for command in ("demo", "read", "ask"):
        assert command in run("--help").output
        assert run(command, "--help").exit_code == 0
    assert "tiny-llama" in run("read", "--help").output

"""Questions asked of streams that were read: every control has its own state, and runs go on where they were cut."""

import numpy as np
import torch
from prose import SEGMENT

from infini_hf import InfiniCache, prefill
from infini_hf.evaluation.controls import closed_memory
from infini_hf.evaluation.needles import jobs, questions, runner
from infini_hf.evaluation.needles.runner import describe, run_needles
from infini_hf.evaluation.needles.samples import SampleFile
from infini_hf.evaluation.needles.streams import Cell


def test_each_control_asks_another_state(prose_model, prose_tokenizer, prose_haystacks, monkeypatch, tmp_path):
    """What reaches the question: the memory, no memory through shut gates, and the memory of the row before."""
    met = []

    def note(asked, prose_tokenizer, cache, prompts, max_new_tokens):
        met.append((asked.model.layers[0].self_attn.memory_gate.closed, cache.infini_layers[0]))
        return ["0"] * len(prompts)

    monkeypatch.setattr(questions, "ask", note)
    cell = Cell("grass", 200, 0.5)
    layouts = {cell: [prose_haystacks.layout(cell, n) for n in range(3)]}
    job = jobs.Job("grass", 200, [0, 1, 2], layouts, questions.ASKED_ALIKE)
    streams = torch.from_numpy(np.stack([prose_haystacks.stream(cell, n)[0] for n in range(3)])).long()
    file = SampleFile(tmp_path / "a.jsonl", {})
    runner.NeedleRun(prose_model, prose_tokenizer, prose_haystacks, file).ask(job, cell, prefill(prose_model, streams))
    samples = file.samples
    assert [(s.control, s.number) for s in samples] == [(c, n) for c in questions.ASKED_ALIKE for n in range(3)]
    alone = [prefill(prose_model, streams[row : row + 1]).infini_layers[0] for row in range(3)]
    for (closed, layer), control in zip(met, questions.ASKED_ALIKE, strict=True):
        assert closed == (control == "closed")
        for row in range(3):
            past = alone[row - 1 if control == "other" else row]
            for actual, expected in (
                (layer.memory, past.memory),
                (layer.memory_norm, past.memory_norm),
                (layer.keys, alone[row].keys),
            ):
                torch.testing.assert_close(actual[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0].memory, alone[1].memory, rtol=1e-2)


def test_asking_leaves_the_cache_as_it_was(prose_model, prose_tokenizer):
    cache = prefill(prose_model, torch.randint(0, 300, (2, 40)), cache=InfiniCache(prose_model.config))
    before = cache.tensors()
    prompts = [np.arange(3, 8, dtype=np.int32), np.arange(3, 6, dtype=np.int32)]
    for control in questions.ASKED_ALIKE:
        questions.ask_with(control, prose_model, prose_tokenizer, cache, prompts, 3)
    assert all(one is two for one, two in zip(cache.tensors(), before, strict=True))


def test_a_closed_memory_leaves_a_trace_in_the_window(prose_model):
    """Two streams differ in their first segment alone, out of reach of the window: whose keys tell them apart."""
    ids = torch.randint(0, 300, (1, 12 * SEGMENT)).expand(2, -1).clone()
    ids[1, :SEGMENT] = torch.randint(0, 300, (SEGMENT,))

    def keys():
        cache = prefill(prose_model, ids)
        return [layer.keys for layer in cache.infini_layers.values()]

    first, second = keys()
    assert first.shape[2] > 0
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-5)
    assert (second[0] - second[1]).abs().max() > 1e-3
    # As the control "window" reads them.
    with closed_memory(prose_model):
        for layer in keys():
            torch.testing.assert_close(layer[0], layer[1], rtol=0, atol=1e-5)


def test_a_run_goes_on_where_it_was_cut(prose_model, prose_tokenizer, prose_haystacks, tmp_path, monkeypatch):
    cells = [Cell("grass", 200, depth) for depth in (0.0, "straddling")]
    about = describe(prose_model, prose_haystacks)

    def run(path, **options):
        file = SampleFile(path, about)
        run_needles(prose_model, prose_tokenizer, cells, range(3), prose_haystacks, file, progress=False, **options)
        return SampleFile(path, about).samples

    whole = run(tmp_path / "a.jsonl")
    assert len(whole) == 2 * 3 * 3
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    # The last cell is gone, but for two samples and a line that a kill cut short.
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:12]) + "\n" + lines[12][:20])
    read, original = [], runner.read_forked
    monkeypatch.setattr(runner, "read_forked", lambda *args: read.extend(args[2]) or original(*args))
    again = run(tmp_path / "b.jsonl")
    assert read == cells[1:]
    assert sorted(map(str, again)) == sorted(map(str, whole))
    read.clear()
    assert run(tmp_path / "b.jsonl") == again
    assert read == []
    assert run(tmp_path / "b.jsonl", controls=("memory", "closed")) == again


def test_a_control_that_is_added_is_asked_alone(prose_model, prose_tokenizer, prose_haystacks, tmp_path, monkeypatch):
    """What the others said is in the file: at a million tokens, every answer takes its time."""
    asked, original = [], runner.ask_with
    monkeypatch.setattr(runner, "ask_with", lambda control, *args: asked.append(control) or original(control, *args))

    def run(controls, path):
        file = SampleFile(path, describe(prose_model, prose_haystacks))
        cells = [Cell("grass", 150, depth) for depth in (0.5, 1.0)]
        run_needles(
            prose_model,
            prose_tokenizer,
            cells,
            range(2),
            prose_haystacks,
            file,
            controls,
            batch_size=2,
            progress=False,
        )
        return sorted(map(str, SampleFile(path).samples))

    run(("memory",), tmp_path / "a.jsonl")
    assert asked == ["memory"] * 2
    asked.clear()
    both = run(("memory", "closed"), tmp_path / "a.jsonl")
    assert asked == ["closed"] * 2
    assert both == run(("memory", "closed"), tmp_path / "b.jsonl")


def test_a_batch_that_would_be_alone_takes_one_more():
    assert jobs.batches_of(range(17), 8) == [[*range(8)], [*range(8, 15)], [15, 16]]
    assert jobs.batches_of(range(5), 2) == [[0, 1], [2, 3, 4]]
    assert jobs.batches_of([5], 8) == [[5]]
    assert jobs.batches_of([5], 2) == [[5]]
    assert jobs.batches_of(range(3), 1) == [[0], [1], [2]]

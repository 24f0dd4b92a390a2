"""Retrieval supervision against every weight of the memory worked out one by one."""

import contextlib

import pytest
import torch
from datasets import Dataset
from models import build_patched, random_ids
from training import GradientCatcher, logged, losses_of, make_trainer, tiny_model, tiny_rows

from infini_hf import InfiniCache, InfiniTrainingArguments
from infini_hf import memory as memory_math
from infini_hf.attention import InfiniAttention
from infini_hf.projections import watched
from infini_hf.retrieval_losses import token_loss
from infini_hf.retrieval_supervision import BoundedKeys, RetrievalSupervision
from infini_hf.segment_step import StepObserver, StepOptions, cut_segments, segment_major_loss

L = 8


def some_sources(batch, length, seed=0):
    """A random earlier column for a third of the tokens, -1 for the others."""
    generator = torch.Generator().manual_seed(seed)
    earlier = (torch.rand(batch, length, generator=generator) * torch.arange(length)).long()
    return torch.where(torch.rand(batch, length, generator=generator) < 1 / 3, earlier, -1)


def read_told(model, ids, mask, cache, told, **options):
    """Read a batch segment after segment, of which nothing is learned but what is told."""
    segments = cut_segments(ids, mask, None, L, trim=False)
    for segment in segments:
        segment.targets = torch.full_like(segment.input_ids, -100)
    options = StepOptions(recompute=False, **options)
    segment_major_loss(model, segments, cache, 1, options, StepObserver(told.begin))


def supervised(
    model, ids, sources, mask=None, layers=None, negatives=0.0, cache=None, losses=("share", 0.0), **options
):
    """The loss of a batch read segment after segment, and the reading."""
    supervision = RetrievalSupervision(1.0, layers, negatives, *losses)
    cache = InfiniCache(model.config) if cache is None else cache
    scale = options.get("write_scale")
    with supervision.reading(model, ids, sources, mask, cache.seen, scale) as told:
        read_told(model, ids, mask, cache, told, **options)
    return told


def projections(model, ids, mask=None, scale=None):
    """Centered queries and keys of every layer for the whole rows, in layer-major order."""
    found = {}

    def note(layer, queries, keys):
        gate = layer.memory_gate
        found[layer.layer_idx] = gate.center_queries(queries), gate.center_keys(keys)

    with watched([module for module in model.modules() if isinstance(module, InfiniAttention)], note):
        model(ids, attention_mask=mask, use_cache=False, **({} if scale is None else {"memory_scale": scale}))
    return found


def oracle(model, ids, sources, mask=None, layers=None, negatives=0.0, scale=None, cut=0):
    """Sums over the told tokens, one by one: -log share, the share in the own row alone, and their number."""
    kind = model.config.infini_attention["feature_map"]
    mask_ = torch.ones_like(ids) if mask is None else mask
    segment = (mask_.cumsum(1) - 1) // L
    times = torch.ones(ids.shape) if scale is None else scale.gather(1, segment.clamp(0, scale.shape[1] - 1))
    losses, shares = [], []
    for index, (queries, keys) in projections(model, ids, mask, scale).items():
        if layers is not None and index not in layers:
            continue
        queries, keys = memory_math.map_queries(queries, kind), memory_math.map_keys(keys, kind)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        for row, column in (sources >= 0).nonzero().tolist():
            asked, source = column - 1, sources[row, column]
            if column == 0 or segment[row, source] >= segment[row, asked]:
                continue
            # The first column of the call that reads the query.
            entered = cut + (asked - cut) // L * L
            if asked < cut or segment[row, entered] != segment[row, asked]:
                continue
            total = 0.0
            for other in range(len(ids)):
                # What the memory of a row holds when the call begins.
                held = (segment[other] < segment[other, entered]) & (mask_[other] > 0)
                weights = torch.einsum("hd,htd->ht", queries[row, :, asked], keys[other]) * times[other]
                if other == row:
                    shares.append((weights[:, source] / (weights * held).sum(1)).mean())
                    total, own = total + (weights * held).sum(1), weights[:, source]
                elif negatives and (scale is None or bool((scale[other] == 1).all())):
                    total = total + negatives * (weights * held).sum(1)
            losses.append(-(own / total).log().mean())
    count = len(layers) if layers else model.config.num_hidden_layers
    return torch.stack(losses).sum() / count, torch.stack(shares).sum().item() / count, len(losses) / count


def rivals_by_token(votes, places, source, tokens):
    """The source, and the sums of the votes of all other places that hold one token."""
    held = {}
    for place, vote in zip(places, votes, strict=True):
        if place != source:
            held[tokens[place].item()] = held.get(tokens[place].item(), 0.0) + vote
    return torch.stack([votes[places.index(source)], *held.values()])


def oracle_of_votes(model, ids, sources, loss, contrast):
    """The vote (by place or by token), 0.3 of -log share, and the contrast, token by token; rows without padding."""
    kind, losses = model.config.infini_attention["feature_map"], []
    segments = torch.arange(ids.shape[1]) // L
    told = [(row, column - 1, int(sources[row, column])) for row, column in (sources >= 0).nonzero().tolist()]
    told = [(row, asked, source) for row, asked, source in told if asked >= 0 and segments[source] < segments[asked]]
    for queries, keys in projections(model, ids).values():
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        for row, asked, source in told:
            places = sorted({place for other, _, place in told if other == row and segments[place] < segments[asked]})
            query, key = queries[row, :, asked].float(), keys[row].float()
            weights = (memory_math.map_queries(query, kind)[:, None] * memory_math.map_keys(key, kind)).sum(-1)
            shares = weights / weights[:, segments < segments[asked]].sum(1, keepdim=True)
            votes = torch.stack([3.0 * shares[:, place].sum() for place in places])
            own = votes[places.index(source)]
            if loss == "tokens":
                votes = rivals_by_token(votes, places, source, ids[row])
            losses.append(votes.logsumexp(0) - own - 0.3 * shares[:, source].log().mean())
            for head in range(len(query)):
                scores = torch.stack([query[head] @ key[head, place] / query.shape[-1] ** 0.5 for place in places])
                missed = scores.logsumexp(0) - scores[places.index(source)]
                losses.append(contrast * missed / len(query))
    return torch.stack(losses).sum() / model.config.num_hidden_layers


def shifted(model):
    """Give the gates shifts, as calibration does."""
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, InfiniAttention):
            config = model.config
            shapes = (config.num_attention_heads, config.head_dim), (config.num_key_value_heads, config.head_dim)
            queries, keys = (torch.randn(shape, generator=generator) for shape in shapes)
            # Far from the bound of "exp", where the gradient is another on purpose.
            module.memory_gate.set_shifts(queries, keys + 8.0 * (config.infini_attention["feature_map"] == "exp"))
    return model


def assert_gradients_alike(model, loss, expected):
    """The gradients of two losses, which reach the keys."""
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.backward()
    assert ours["model.layers.1.self_attn.k_proj.weight"].abs().max() > 1e-3
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            largest = max(1e-3, parameter.grad.abs().max().item())
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_keys_at_the_bound_are_led_back_but_not_further_up():
    keys = torch.tensor([7.0, 8.0, 9.0, 30.0], requires_grad=True)
    for direction, passed in ((1.0, [1, 1, 1, 1]), (-1.0, [1, 0, 0, 0])):
        mapped = BoundedKeys.apply(keys)
        assert torch.equal(mapped, memory_math.map_keys(keys, "exp"))
        (gradient,) = torch.autograd.grad(direction * mapped.sum(), keys)
        torch.testing.assert_close(gradient, direction * mapped.detach() * torch.tensor(passed))


@pytest.mark.parametrize("padding", [None, "left", "all left", "right"])
@pytest.mark.parametrize(
    ("kind", "layers", "negatives"), [("elu", None, 0.0), ("exp", [1], 0.5), ("softmax", [1], 0.5)]
)
def test_the_loss_and_its_gradients_are_those_of_the_weights_one_by_one(kind, layers, negatives, padding):
    model = shifted(build_patched("llama", segment_length=L, overlap=3, feature_map=kind)).train()
    ids, sources, mask = random_ids(3, 4 * L + 3), some_sources(3, 4 * L + 3), None
    if padding is not None:
        mask = torch.ones_like(ids)
        # With all rows padded by a little, none has closed a segment when the second begins.
        first, count = (slice(None), 3) if padding == "all left" else (1, 5)
        padded = slice(-count, None) if padding == "right" else slice(None, count)
        mask[first, padded] = 0
        # Nobody is told of padding.
        sources[first, padded] = -1
        nowhere = sources >= ids.shape[1] - count if padding == "right" else sources < count
        sources[first] = torch.where(nowhere, -1, sources)[first]
    told = supervised(model, ids, sources, mask, layers, negatives)
    expected, share, count = oracle(model, ids, sources, mask, layers, negatives)
    torch.testing.assert_close(told.loss, expected, rtol=1e-5, atol=1e-5)
    assert told.shares.tolist() == pytest.approx([share, count], rel=1e-4)
    assert_gradients_alike(model, told.loss, expected)


@pytest.mark.parametrize(("loss", "contrast"), [("votes", 0.0), ("votes", 0.7), ("tokens", 0.0), ("tokens", 0.7)])
@pytest.mark.parametrize("kind", ["elu", "exp", "softmax"])
def test_votes_and_contrast_are_those_of_the_tokens_one_by_one(kind, loss, contrast):
    """Also where several tokens repeat one source, and where several sources hold the same token."""
    model = shifted(build_patched("llama", segment_length=L, overlap=3, feature_map=kind)).train()
    ids, sources = random_ids(3, 5 * L + 3), some_sources(3, 5 * L + 3)
    sources[0, 30:34], sources[1] = 4, -1
    stated = sources[2][sources[2] >= 0].unique()
    ids[2, stated[: len(stated) // 2 + 1]] = ids[2, stated[0]].item()
    told = supervised(model, ids, sources, losses=(loss, contrast))
    expected = oracle_of_votes(model, ids, sources, loss, contrast)
    other = supervised(model, ids, sources, losses=({"votes": "tokens", "tokens": "votes"}[loss], contrast))
    assert not torch.isclose(told.loss, other.loss, rtol=1e-4)
    torch.testing.assert_close(told.loss, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_alike(model, told.loss, expected)


def test_a_source_counts_as_often_as_it_was_written_and_scaled_rows_are_no_negatives():
    model = build_patched("llama", segment_length=L, overlap=3, feature_map="exp").train()
    ids, sources = random_ids(3, 4 * L), some_sources(3, 4 * L)
    scale = torch.tensor([[1.0, 9.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [30.0, 1.0, 4.0, 1.0]])
    told = supervised(model, ids, sources, negatives=0.5, write_scale=scale)
    expected, _, _ = oracle(model, ids, sources, negatives=0.5, scale=scale)
    torch.testing.assert_close(told.loss, expected, rtol=1e-5, atol=1e-5)
    plain = supervised(model, ids, sources, negatives=0.5)
    assert not torch.isclose(plain.loss, told.loss, rtol=1e-2)


@pytest.mark.parametrize("cut", [3 * L, 3 * L + 5])
def test_what_was_read_before_the_row_stands_beside_its_sources(cut):
    """Also where the row begins in the middle of a segment, and some queries read a memory that came in between."""
    model = build_patched("llama", segment_length=L, feature_map="exp").train()
    ids, whole = random_ids(2, 12 * L), some_sources(2, 12 * L)
    # Sources before the cut do not exist for the second half.
    whole[:, :cut] = -1
    whole[whole < cut] = -1
    cache = InfiniCache(model.config)
    with torch.no_grad():
        model(ids[:, :cut], past_key_values=cache)
    half = torch.where(whole >= 0, whole - cut, -1)[:, cut:]
    scale = torch.tensor([[5.0, 1.0, 2.0], [1.0, 7.0, 1.0]])
    told = supervised(model, ids[:, cut:], half, cache=cache, write_scale=scale)
    whole_scale = torch.cat([torch.ones(2, 3), scale], dim=1)
    expected, _, count = oracle(model, ids, whole, scale=whole_scale, cut=cut)
    assert count
    torch.testing.assert_close(told.loss, expected, rtol=1e-5, atol=1e-5)


def test_where_the_state_is_cut_the_gradient_does_not_go_around_it():
    model = build_patched("llama", segment_length=L, feature_map="exp").train()
    ids = random_ids(1, 3 * L)
    sources = torch.full_like(ids, -1)
    sources[0, 2 * L + 4] = 3
    embeddings = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embeddings.append(output.requires_grad_()) or output.retain_grad()
    )
    for bptt, reaches in ((None, True), (1, False)):
        embeddings.clear()
        supervised(model, ids, sources, bptt_segments=bptt).loss.backward()
        gradient = embeddings[0].grad
        assert (gradient is not None and bool(gradient.abs().max() > 0)) == reaches


def told_rows(length=40):
    """Rows whose last tokens repeat their first."""
    rows = tiny_rows(documents=4, parts=1, last=length)
    for row in rows:
        ids = [*row["input_ids"][:-4], *row["input_ids"][2:6]]
        row.update(input_ids=ids, labels=ids, sources=[-1] * (length - 4) + [2, 3, 4, 5])
    return rows


OPTIONS = {"retrieval_weight": 3.0, "retrieval_negatives": 0.5, "recompute_segments": False, "max_steps": 1}


def test_the_trainer_adds_it_to_the_loss_and_logs_the_share(tmp_path):
    rows = told_rows()
    options = {**OPTIONS, "retrieval_negatives": 0.0, "per_device_train_batch_size": 4}
    plain = make_trainer(tmp_path, rows=rows, **{**options, "retrieval_weight": 0.0})
    taught = make_trainer(tmp_path, rows=rows, **options)
    ids, sources = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "sources"))
    loss, share, count = oracle(tiny_model().train(), ids, sources)
    assert count == 16
    (without,), (found,) = losses_of(plain), losses_of(taught)
    assert found - without == pytest.approx(3.0 * loss.item() / (4 * 39), rel=1e-4)
    assert logged(taught, "retrieval_share")[0] == pytest.approx(share / count, rel=1e-4)
    assert logged(taught, "told_loss")[0] == pytest.approx(found - without, rel=1e-3)
    assert not logged(plain, "retrieval_share")
    assert not logged(plain, "told_loss")
    parted = {**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    taught = make_trainer(tmp_path, rows=rows, **parted)
    taught.train()
    assert logged(taught, "told_loss")[0] == pytest.approx(found - without, rel=1e-3)


def assert_alike_however_divided(folder, rows, options):
    """One micro-batch of four rows against two of two: the gradients of a step."""
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        catcher = GradientCatcher()
        make_trainer(
            folder,
            rows=rows,
            parts={"callbacks": [catcher]},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            **options,
        ).train()
        found.append(catcher.steps[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_do_not_depend_on_how_rows_are_divided_into_micro_batches(tmp_path):
    assert_alike_however_divided(tmp_path, told_rows(), {**OPTIONS, "retrieval_negatives": 0.0})


def test_filling_of_ranks_is_not_taken_for_a_segment():
    model = build_patched("llama", segment_length=L).train()
    ids, sources = random_ids(2, 3 * L), some_sources(2, 3 * L)
    expected = supervised(model, ids, sources).loss
    assert torch.equal(supervised(model, ids, sources, filling=2).loss, expected)


def test_layers_go_back_to_their_own_projections():
    model = build_patched("llama", segment_length=L)
    supervised(model, random_ids(1, 2 * L), some_sources(1, 2 * L))
    assert not any("project" in vars(module) for module in model.modules())


def test_also_when_reading_fails_and_inside_another_watch():
    model, seen = build_patched("llama", segment_length=L), []
    layers = [module for module in model.modules() if isinstance(module, InfiniAttention)]
    with watched(layers, lambda layer, queries, keys: seen.append(layer.layer_idx)):
        with pytest.raises(KeyError), watched(layers, lambda *states: {}["nothing"]):
            model(random_ids(1, L), use_cache=False)
        seen.clear()
        model(random_ids(1, L), use_cache=False)
        assert seen == [0, 1]
    assert not any("project" in vars(module) for module in model.modules())


def test_the_places_of_a_token_stand_together_against_the_source():
    """By hand: -inf is not held, the source's own token elsewhere is a rival, and so is each other token."""
    votes = torch.tensor([[0.5, 0.3, 0.3, -torch.inf, 0.2], [0.5, 0.3, -torch.inf, 0.1, 0.2]], requires_grad=True)
    tokens = torch.tensor([7, 5, 5, 9, 7])
    loss = token_loss(votes, tokens, torch.tensor([0, 1]))
    first = torch.tensor([1.5, 1.8, 0.6]).logsumexp(0) - 1.5
    second = torch.tensor([0.9, 2.1, 0.3]).logsumexp(0) - 0.9
    torch.testing.assert_close(loss, first + second)
    (gradient,) = torch.autograd.grad(loss, votes)
    assert gradient.isfinite().all()
    assert gradient[0, 3] == gradient[1, 2] == 0
    assert ((gradient[0, :3].sign() == torch.tensor([-1, 1, 1])) & (gradient[0, 1] == gradient[0, 2])).all()
    alone = torch.tensor([[0.4, -torch.inf]], requires_grad=True)
    (gradient,) = torch.autograd.grad(token_loss(alone, torch.tensor([3, 3]), torch.tensor([0])), alone)
    assert torch.equal(gradient, torch.zeros(1, 2))


@pytest.mark.parametrize("losses", [("share", 0.0), ("votes", 0.5), ("tokens", 0.5)])
def test_layers_named_twice_count_once_and_autocast_changes_nothing_in_the_loss_itself(losses):
    model = build_patched("llama", segment_length=L, feature_map="exp").train()
    ids, sources = random_ids(2, 3 * L), some_sources(2, 3 * L)
    once = supervised(model, ids, sources, layers=[1], losses=losses).loss
    assert torch.equal(supervised(model, ids, sources, layers=[1, 1], losses=losses).loss, once)
    reading, states = supervised(model, ids, sources, layers=[1], losses=losses), []
    layer, index = model.model.layers[1].self_attn, reading.index
    queries, keys = torch.randn(2, 6, L, 8), torch.randn(2, 3, L, 8)
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        reading.keys[1], reading.loss = reading.keys[1][:index], 0.0
        with context:
            reading.note(layer, queries, keys)
        states.append(reading.loss)
    assert torch.equal(*states)
    assert states[0] > 0


def test_rows_without_sources_are_said_to_teach_nothing_once(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **{**OPTIONS, "max_steps": 3})
    trainer.train()
    assert sum("retrieval_weight=3" in record.message for record in caplog.records) == 1


def test_memory_is_carried_beside_it_and_evaluation_needs_no_sources(tmp_path):
    rows = told_rows()
    for index, row in enumerate(rows):
        row.update(document=index % 2, part=index // 2)
    rows = [rows[index] for index in (0, 2, 1, 3)]
    trainer = make_trainer(
        tmp_path, rows=rows, carry_memory=True, parts={"eval_dataset": Dataset.from_list(rows)}, **OPTIONS
    )
    trainer.train()
    assert 0 < logged(trainer, "retrieval_share")[0] < 1
    with_sources = trainer.evaluate()["eval_loss"]
    plain = Dataset.from_list(rows).remove_columns("sources")
    assert with_sources == trainer.evaluate(plain)["eval_loss"]
    assert trainer.supervision.retrieval.noted.tolist() == [0.0, 0.0]


def test_what_cannot_be_told_is_refused(tmp_path):
    model, ids = build_patched("llama", segment_length=L), random_ids(1, 2 * L)
    for layers, named in (([1, 5], r"\[5\]"), ([], "none")):
        with pytest.raises(ValueError, match=f"{named} are not among the patched "):
            supervised(model, ids, some_sources(1, 2 * L), layers=layers)
    with pytest.raises(ValueError, match=r"retrieval_layers=\[5\]: \[5\] are not among the patched \[0, 1\]"):
        make_trainer(tmp_path, **OPTIONS, retrieval_layers=[5])
    with pytest.raises(ValueError, match="set recompute_segments=False"):
        InfiniTrainingArguments(str(tmp_path), use_cpu=True, retrieval_weight=1.0)
    for name in ("retrieval_weight", "retrieval_negatives"):
        with pytest.raises(ValueError, match=f"{name}=-1.0: must be at least 0"):
            InfiniTrainingArguments(str(tmp_path), use_cpu=True, recompute_segments=False, **{name: -1.0})

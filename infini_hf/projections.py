"""Looking at the queries and keys of patched layers while a model reads."""

from contextlib import contextmanager


@contextmanager
def watched(layers, note):
    """Call `note(layer, queries, keys)` for whatever the layers project inside the `with`.

    Args:
        layers (iterable of [`InfiniAttention`]): the layers to watch.
        note (`Callable`): gets queries `(batch, num_heads, seq_len, head_dim)` and keys
            `(batch, num_kv_heads, seq_len, head_dim)`, both before RoPE and in the graph of autograd.
    """
    layers = list(layers)
    before = [vars(layer).get("project") for layer in layers]

    def watcher(layer, project):
        def watch(hidden_states):
            queries, keys, values = project(hidden_states)
            note(layer, queries, keys)
            return queries, keys, values

        return watch

    try:
        for layer in layers:
            layer.project = watcher(layer, layer.project)
        yield
    finally:
        for layer, project in zip(layers, before, strict=True):
            vars(layer).pop("project", None)
            if project is not None:
                layer.project = project

"""What the scripts have in common: the options of the model, of LoRA and of the data, and how they are carried out."""

import re
import shlex
import sys
from dataclasses import dataclass, field, replace

import torch
from transformers import AutoConfig, AutoTokenizer

from ..assets import shipped
from ..auto import AutoInfiniModelForCausalLM
from ..config import InfiniConfig
from ..data.documents import check_count, load_documents, written
from ..data.lane_order import lane_stream
from ..data.local_parts import held_out_split
from ..data.packing import pack_documents
from .adapters import adapter_patch, load_adapted
from .names import find_adapter, find_dtype, find_model, find_source, loading

MATMUL_PRECISIONS = ("highest", "high", "medium")


@dataclass
class ModelArguments:
    """The model and its patch."""

    model: str = field(metadata={"help": f"hub name, folder, or shipped checkpoint ({', '.join(shipped())})"})
    dtype: str = field(default="auto", metadata={"help": "weights' dtype: auto, float32, bfloat16, float16"})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2 …"})
    segment_length: int | None = field(
        default=None,
        metadata={"help": "tokens in a segment; default: the model's, as with every option of a patch that it has"},
    )
    memory_update: str | None = field(
        default=None, metadata={"help": "linear or delta (default: the model's, or linear)"}
    )
    feature_map: str | None = field(
        default=None, metadata={"help": "elu, exp or softmax (default: the model's, or elu)"}
    )
    gate: str | None = field(default=None, metadata={"help": "tanh or sigmoid (default: the model's, or tanh)"})
    overlap: int | None = field(
        default=None,
        metadata={"help": "tokens of the last segment that local attention still sees (default: the model's, or 0)"},
    )
    sink_tokens: int | None = field(
        default=None, metadata={"help": "first tokens that local attention always sees (default: the model's, or 0)"}
    )
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's choice"})
    matmul_precision: str | None = field(
        default=None,
        metadata={
            "help": "of float32 products: highest, high or medium; on CPUs that multiply bfloat16, medium with "
            "attn_implementation eager was the fastest to train"
        },
    )

    def asked(self):
        """What is asked of the patch, by the names of [`InfiniConfig`]."""
        names = ("segment_length", "memory_update", "feature_map", "gate", "overlap", "sink_tokens")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def infini_config(self, stored=None):
        """The patch asked for: that of the checkpoint, or the defaults, with what is asked for in its place.

        Args:
            stored ([`InfiniConfig`], *optional*): the patch that the checkpoint has, if it has one.

        Returns:
            [`InfiniConfig`] or `None`: `None` where nothing is asked for, so that the checkpoint's stays.

        Raises:
            ValueError: when a part of a patch is asked for, of a model that has none, without `segment_length`.
        """
        asked = self.asked()
        if not asked:
            return None
        if stored is not None:
            return replace(stored, **asked)
        if "segment_length" not in asked:
            name, value = next(iter(asked.items()))
            raise ValueError(
                f"{name}={value!r} without segment_length: {self.model!r} is not patched yet, and its first patch is "
                "asked for as a whole; give segment_length too"
            )
        return InfiniConfig(**asked)

    def check(self, adapter=None):
        """Refuse what can be refused before anything is read, and return what `from_pretrained` takes for the model.

        Args:
            adapter (`str`, *optional*): the folder of an adapter, or its name on the hub.

        Raises:
            ValueError: for a model that is not there, a patch that is none or not the adapter's, or an unknown
                dtype or precision.
        """
        if self.matmul_precision not in (None, *MATMUL_PRECISIONS):
            raise ValueError(f"matmul_precision={self.matmul_precision!r}: must be one of {MATMUL_PRECISIONS}")
        find_dtype(self.dtype)
        name = find_model(self.model)
        if adapter is None:
            self.infini_config(self.stored(name))
        else:
            adapter_patch(adapter, self.asked())
        return name

    def stored(self, name):
        """The patch that a checkpoint has, or `None`; it is not looked for where nothing is asked of it.

        Args:
            name (`str`): what [`find_model`] made of the model's name.
        """
        if not self.asked():
            return None
        with loading(self.model):
            values = getattr(AutoConfig.from_pretrained(name), "infini_attention", None)
        return None if values is None else InfiniConfig.from_dict(values)

    def load(self, adapter=None, merge=False, **options):
        """The patched model, with an adapter if one is named, and its tokenizer.

        Args:
            adapter (`str`, *optional*): its folder, or its name on the hub; it brings its own patch.
            merge (`bool`, *optional*, defaults to `False`): work the adapter into the weights.
            options: what `from_pretrained` takes.
        """
        folder = find_adapter(adapter)
        name = self.check(folder)
        if self.threads < 0:
            raise ValueError(f"threads={self.threads}: must be at least 1, or 0 for torch's choice")
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.matmul_precision is not None:
            torch.set_float32_matmul_precision(self.matmul_precision)
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        options["dtype"] = find_dtype(self.dtype)
        with loading(self.model if adapter is None else f"{self.model} with {adapter}"):
            if folder is None:
                patch = self.infini_config(self.stored(name))
                model = AutoInfiniModelForCausalLM.from_pretrained(name, infini_config=patch, **options)
            else:
                model = load_adapted(name, folder, merge, **options)
            return model, AutoTokenizer.from_pretrained(name)


@dataclass
class LoraArguments:
    """Low-rank adapters; full weights without `lora_r`."""

    lora_r: int | None = field(
        default=None, metadata={"help": "rank of the adapters; all weights are trained without, or with 0"}
    )
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapters is lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={"help": "layers to adapt, or all-linear"},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the base in 4 bits (needs bitsandbytes)"})

    def __post_init__(self):
        if (self.lora_r or 0) < 0:
            raise ValueError(f"lora_r={self.lora_r}: must be at least 1, or left out to train all weights")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: must be from 0 to below 1")
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules: name the layers to adapt, or all-linear")
        if self.load_in_4bit and not self.lora_r:
            raise ValueError("load_in_4bit needs lora_r: weights of four bits cannot be trained")

    def loading_options(self):
        """What `from_pretrained` needs for a quantised base."""
        if not self.load_in_4bit:
            return {}
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)}

    def wrap(self, model):
        """The model with adapters and trainable gates, or the model itself."""
        if not self.lora_r:
            return model
        from ..lora import add_lora

        options = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        # PEFT knows this word as a string alone; in a list it would be the name of a layer.
        targets = "all-linear" if self.lora_target_modules == ["all-linear"] else self.lora_target_modules
        return add_lora(model, target_modules=targets, **options)


def rows_to_draw(args):
    """How many rows a run reads whose rows are drawn for it; also of stock `TrainingArguments`.

    Raises:
        ValueError: when `max_steps` does not say how many steps there are.
    """
    if args.max_steps < 1:
        raise ValueError(f"max_steps={args.max_steps}: must be at least 1, since rows are drawn for so many steps")
    groups = getattr(args, "row_groups", 1)
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * groups


def command_line(script, argv=None):
    """The command that a script was called with, without the token of the hub."""
    words = sys.argv[1:] if argv is None else argv
    return re.sub(r"(--hub[_-]token[ =])\S+", r"\1HUB_TOKEN", shlex.join(["python", script, *words]))


@dataclass
class DocumentArguments:
    """Documents for continual pretraining, and how they are cut into rows."""

    train_source: str = field(metadata={"help": "folder or file of texts, or a hub dataset (pg19)"})
    eval_source: str | None = field(default=None, metadata={"help": "the same, for evaluation"})
    train_split: str = field(default="train", metadata={"help": "split of train_source"})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "default: validation, or test; all of a local file, and of a folder that names no parts"},
    )
    text_column: str = field(default="text", metadata={"help": "column that holds the documents"})
    where: str | None = field(default=None, metadata={"help": "keep rows by column=value or column~part of the value"})
    streaming: bool = field(default=False, metadata={"help": "read while training; needs max_steps"})
    shuffle_buffer: int = field(
        default=64,
        metadata={
            "help": "documents held to shuffle a stream with: anew in every pass, joined or in lanes alike in all; 0 "
            "keeps the order of the source"
        },
    )
    limit: int | None = field(default=None, metadata={"help": "documents to train on, the first ones"})
    eval_limit: int | None = field(default=None, metadata={"help": "documents to evaluate on"})
    segments_per_row: int = field(default=4, metadata={"help": "segments in a training row"})
    eval_segments_per_row: int = field(default=64, metadata={"help": "segments in an evaluation row: streamed"})
    join: bool = field(default=False, metadata={"help": "let rows run over the ends of (short) documents"})

    def __post_init__(self):
        check_count("shuffle_buffer", self.shuffle_buffer, 0)

    def check_sources(self):
        """Look for local sources, before a model is loaded for them."""
        find_source(self.train_source, "train_source")
        if self.eval_source is not None:
            find_source(self.eval_source, "eval_source")
            if self.eval_split is None:
                held_out_split(self.eval_source)

    def rows(self, tokenizer, segment_length, lanes=None, seed=0):
        """The training rows; in lane order where a stream carries its memory on.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
            segment_length (`int`): tokens in a segment.
            lanes (`int`, *optional*): rows of a micro-batch of all processes, where the memory is carried on.
            seed (`int`, *optional*, defaults to `0`): a stream is shuffled by it; a table is shuffled in training.

        Raises:
            ValueError: when there are fewer documents than `lanes`, as where a stream joins them all.
        """
        if lanes and self.streaming and self.join:
            raise ValueError(
                "join with streaming and carry_memory: joined rows are one document, and every lane reads one of its "
                "own; leave one of the three out"
            )
        documents = load_documents(
            find_source(self.train_source, "train_source"),
            self.train_split,
            self.text_column,
            streaming=self.streaming,
            where=self.where,
            limit=self.limit,
        )
        if lanes and not self.streaming and len(documents) < lanes:
            raise ValueError(
                f"train_source={self.train_source!r}: {len(documents)} documents, and carry_memory reads {lanes} at "
                "once, one in each row of a batch (per_device_train_batch_size × row_groups): give more documents (of "
                f"a folder: .txt files), or --per_device_train_batch_size {max(1, len(documents))}, or --carry_memory "
                "false"
            )
        if self.streaming and self.shuffle_buffer:
            documents = documents.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        rows = pack_documents(documents, tokenizer, segment_length, self.segments_per_row, join=self.join)
        return lane_stream(rows, lanes) if self.streaming and lanes else rows

    def eval_rows(self, tokenizer, segment_length):
        """The evaluation rows, or `None`."""
        if self.eval_source is None:
            return None
        source = find_source(self.eval_source, "eval_source")
        split = self.eval_split or held_out_split(self.eval_source)
        # Where training reads a source on and on, its few texts to evaluate on must not bring down all of it.
        options = {"streaming": self.streaming, "where": self.where, "limit": self.eval_limit}
        documents = load_documents(source, split, self.text_column, **options)
        if self.streaming:
            if next(iter(documents), None) is None:
                raise ValueError(f"eval_source={self.eval_source!r}: where={self.where!r} keeps none of its rows")
            documents = written(documents)
        return pack_documents(documents, tokenizer, segment_length, self.eval_segments_per_row)

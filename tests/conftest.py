"""Every test runs offline, on one CPU thread, from a fixed seed."""

import os
import sys
from pathlib import Path

# Before anything imports transformers, which reads it once; HF_HUB_OFFLINE=0 outside is for the tests marked `hub`.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The helpers beside the tests (models, oracle) are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--fast-paths",
        choices=("auto", "always", "never"),
        default="auto",
        help="run every test with each fast path of a layer taken always, never, or where it pays",
    )


def pytest_sessionstart(session):
    # Tiny matrices are slower on many threads, and rounding should not depend on the machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the shipped checkpoint; a module that needs another one has a fixture of its own."""
    from transformers import AutoTokenizer

    from infini_hf.assets import resolve

    return AutoTokenizer.from_pretrained(resolve("tiny-llama"))


@pytest.fixture(scope="session")
def prose_tokenizer():
    """A tokenizer of the tests' own prose, for rows and streams with needles."""
    from prose import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="module")
def prose_model(prose_tokenizer):
    """A tiny model of that tokenizer, with open gates."""
    from prose import build_model

    return build_model(len(prose_tokenizer))


@pytest.fixture(scope="module")
def prose_haystacks(prose_tokenizer):
    """Streams of the benchmark's passkey in that prose and in grass."""
    from prose import PROSE, SEGMENT

    from infini_hf.data.needle_tasks import PasskeyTask
    from infini_hf.evaluation.needles.streams import Haystacks

    return Haystacks(prose_tokenizer, SEGMENT, PasskeyTask(), [PROSE])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def chosen_paths(request):
    from infini_hf.fast_paths import fast_paths

    with fast_paths(request.config.getoption("--fast-paths")):
        yield

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


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

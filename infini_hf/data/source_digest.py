"""What the code that makes rows is known by.

`datasets` keeps prepared rows on the disk and knows a function by its name and arguments: without this, rows that an
older version prepared would be trained on without a word.
"""

import functools
import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent


def source_digest():
    """A digest of the source of this package's data code, `str`, to stand among the arguments of what makes rows."""
    return digest_of(FOLDER)


@functools.cache
def digest_of(folder):
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

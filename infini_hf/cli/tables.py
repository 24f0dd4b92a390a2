"""What a benchmark says at its end."""


def write_tables(lines, output=None):
    """Print lines of markdown, and write them to the file `output`, where there is one."""
    text = "\n".join(lines) + "\n"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    print(text)

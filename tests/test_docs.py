"""The documentation is true: every block runs or is checked, every name, option, link and signature is there."""

import ast
import contextlib
import inspect
import io
import pkgutil
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import typer
import yaml

import infini_hf
from infini_hf.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
NEEDS_HUB = "# needs the hub"
# Commands of the shell whose arguments are the reader's own affair.
SHELL = ("cd", "export", "git", "source")

pages = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the number of its first line of text, and whether it follows another."""

    language: str
    text: str
    line: int
    follows: bool


def blocks_of(page):
    """All fenced blocks of a page, in order."""
    blocks, opened, previous = [], None, None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        fence = re.match(r"( *)(```+|~~~+)\s*(\S*)", line)
        if opened is None and fence:
            opened = (fence[1], fence[2], fence[3], number)
        elif opened is not None and line.strip() == opened[1]:
            indent, _, language, start = opened
            text = "\n".join(row.removeprefix(indent) for row in lines[start : number - 1])
            follows = previous is not None and not any(row.strip() for row in lines[previous : start - 1])
            blocks.append(Block(language, text, start + 1, follows))
            opened, previous = None, number
    assert opened is None, f"{page}: the block in line {opened[3]} has no end"
    return blocks


def prose_of(page):
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


# Python.


class Reader:
    """Runs or checks the blocks of one page in order; Python blocks share a namespace."""

    def __init__(self, page):
        self.page, self.namespace, self.printed = page, {"__name__": "__main__"}, ""

    def handle(self, block):
        """Run or check one block; a language that nobody knows how to check is an error."""
        handlers = {
            "python": self.run,
            "bash": lambda block: [check_command(line) for line in commands(block.text)],
            "text": self.compare,
            "yaml": lambda block: yaml.safe_load(block.text),
        }
        assert block.language in handlers, f"line {block.line}: a block of language {block.language!r} is not checked"
        if block.language != "text":
            self.printed = ""
        if block.language == "python" and block.text.startswith(NEEDS_HUB):
            return check_without_running(block.text)
        return handlers[block.language](block)

    def run(self, block):
        # Empty lines in front make a traceback name the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.namespace)
        self.printed = printed.getvalue()

    def compare(self, block):
        """Text right behind a Python block is what the block prints."""
        if block.follows and self.printed:
            assert block.text.strip() == self.printed.strip(), f"line {block.line}: not what the block above prints"


def check_without_running(text):
    """A block that needs the hub: it is Python, names a model of the hub, and uses names and options that exist."""
    tree = ast.parse(text)
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert any(isinstance(value, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", value) for value in constants), (
        "a block that needs the hub names a model of the hub; run the others"
    )
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "infini_hf":
            for alias in node.names:
                known[alias.asname or alias.name] = resolve_name(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "infini_hf"]
            known.update({"infini_hf": infini_hf} if names else {})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            lookup(node, known)
        elif isinstance(node, ast.Call):
            check_keywords(lookup(node.func, known), [keyword.arg for keyword in node.keywords])


def resolve_name(dotted):
    """The object behind a dotted name that begins with `infini_hf`."""
    return pkgutil.resolve_name(dotted)


def lookup(node, known):
    """What an expression of names and attributes of this package stands for, `None` for anything else."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = lookup(node.value, known)
        return None if owner is None else getattr(owner, node.attr)
    return None


def check_keywords(function, keywords):
    if function is None:
        return
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    assert set(keywords) - {None} <= set(parameters), f"{function.__name__} takes no such argument: {keywords}"


# Commands.


def commands(text):
    """The single commands of a block, continued lines joined, comments left out, each as its words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((place for place, word in enumerate(words) if word in ("&&", "||", "|", ";", ">")), len(words))
            part, joint, words = words[:end], words[end : end + 1], words[end + 1 :]
            if part:
                yield part
            if joint == [">"]:
                words = words[1:]


def check_command(words):
    """One command: the program is one that the test knows, and takes what it is given.

    Programs of a virtual environment (`.venv/bin/pip`) and variables set in front are seen through.
    """
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, arguments = re.sub(r"^\.?\w*venv\w*/bin/", "", words[0]), words[1:]
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        program, arguments = arguments[1], arguments[2:]
    if program in ("python", "python3") or (program, arguments[:1]) == ("accelerate", ["launch"]):
        script = next(place for place, word in enumerate(arguments) if word.endswith(".py"))
        check_script(arguments[script], arguments[script + 1 :])
    elif program == "infini-hf":
        check_cli(arguments)
    elif program == "pip":
        check_install(arguments)
    elif program in ("pytest", "ruff"):
        check_paths(word for word in arguments if "/" in word)
    else:
        assert program in (*SHELL, "venv"), f"{words}: a command that the test does not know how to check"


def check_paths(paths):
    for path in paths:
        assert (ROOT / path.split("::")[0]).exists(), f"{path} is not there"


def check_cli(arguments):
    """`infini-hf`: the command is there, its options are, they have values of their kind, and nothing is missing."""
    group = typer.main.get_command(app)
    if arguments and not arguments[0].startswith("-"):
        assert arguments[0] in group.commands, f"infini-hf has no command {arguments[0]!r}"
        command, arguments = group.commands[arguments[0]], arguments[1:]
    else:
        command = group
    values, rest, _ = command.make_parser(command.context_class(command)).parse_args(list(arguments))
    assert not rest or command is group, f"infini-hf {command.name}: {rest} is too much"
    if {"-h", "--help", "--version"} & set(arguments):
        return
    missing = [parameter.name for parameter in command.params if parameter.required and not values.get(parameter.name)]
    assert not missing, f"infini-hf {command.name}: {missing} missing in {arguments}"
    if command is not group:
        kinds = inspect.signature(command.callback).parameters
        for name, value in values.items():
            if kinds[name].annotation in (int, float) and value is not None:
                kinds[name].annotation(value)


@cache
def script_help(script):
    """What a script prints for `--help`; it runs in this process, where everything is imported already."""
    argv, sys.argv = sys.argv, [script, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = argv
    assert stopped.value.code in (0, None)
    return printed.getvalue()


def check_script(script, arguments):
    """A script: it is there, has the options, and the config files it is given are there."""
    check_paths([script])
    known = set(re.findall(r"--[\w-]+", script_help(script)))
    options = {word.split("=")[0] for word in arguments if word.startswith("--")}
    assert options <= known, f"{script} has no {sorted(options - known)}"
    check_paths(word for word in arguments if word.startswith("configs/"))


def check_install(arguments):
    """`pip install`: what is installed is this project or one that it names, its extras and files are there."""
    assert arguments[0] == "install", f"pip {arguments}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = {re.match(r"[\w-]+", entry)[0] for entry in [*project["dependencies"], *chain(*extras.values())]}
    takes_file = {"-c", "-r", "--constraint", "--requirement"}
    for before, word in zip(["install", *arguments[1:]], arguments[1:], strict=False):
        if before in takes_file:
            check_paths([word])
        elif not word.startswith("-"):
            name, listed = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?.*", word).groups()
            assert name in {".", "infini_hf", "infini-hf"} | named, f"pip install {word}: is none of the project's"
            assert not listed or set(listed.split(",")) <= set(extras), f"pip install {word}: no such extra"


# The tests.


@pages
def test_every_block_runs_or_is_checked(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader, blocks = Reader(page.relative_to(ROOT)), blocks_of(page)
    for block in blocks:
        reader.handle(block)
    # Counted once more without the parser, so that it cannot lose one.
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(blocks) == sum(line.lstrip().startswith(("```", "~~~")) for line in lines) / 2


def test_there_are_pages_with_blocks():
    assert {"README.md", "docs/quickstart.md", "docs/streaming.md"} <= set(NAMES)
    assert sum(len(blocks_of(page)) for page in PAGES) > 30


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}: no such heading"


@pages
def test_files_and_tests_that_are_named_are_there(page):
    code = re.findall(r"`([^`\n]+)`", prose_of(page))
    folders = "infini_hf|tests|scripts|configs|docs"
    check_paths(word for word in code if re.fullmatch(rf"({folders})/[\w./-]+(::\w+)?", word))
    for word in code:
        if named := re.fullmatch(r"(?:tests/)?(test_\w+\.py)::(\w+)", word):
            source = (ROOT / "tests" / named[1]).read_text(encoding="utf-8")
            assert f"def {named[2]}(" in source, f"{word} is not there"


def api_entries():
    """`(dotted name, signature or None)` for every heading of the API page that names one thing of Python."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for found in re.finditer(r"^### `([\w.]+)(\(.*\))?`\n(?:\n```text\n([^`]*)\n```)?", page, re.MULTILINE):
        name, signature, below = found.groups()
        if signature == "(...)":
            signature = "(" + below.partition("(")[2]
        yield name, signature


def test_every_public_name_is_on_the_api_page():
    named = {name for name, _ in api_entries()}
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in infini_hf.__all__:
        assert name in {entry.split(".")[0] for entry in named} or f"`infini_hf.{name}`" in page, name
    for kind in (infini_hf.InfiniCache, infini_hf.InfiniConfig, infini_hf.AutoInfiniModelForCausalLM):
        fields = vars(kind).get("__dataclass_fields__", ())
        members = {name for name in vars(kind) if not name.startswith("_") and name not in fields}
        assert {f"{kind.__name__}.{name}" for name in members} <= named


@pytest.mark.parametrize(("name", "signature"), list(api_entries()))
def test_signatures_on_the_api_page_are_those_of_the_code(name, signature):
    thing = resolve_name(f"infini_hf.{name}")
    if signature is None:
        assert not callable(thing)
        return
    arguments = " ".join(signature[1:-1].split())
    # A default may be a name of the module.
    shown = inspect.signature(eval(f"lambda {arguments}: None", dict(vars(sys.modules[thing.__module__]))))
    parameters = list(inspect.signature(thing).parameters.values())
    if parameters and parameters[0].name == "self":
        del parameters[0]
    assert [(p.name, p.kind, p.default) for p in shown.parameters.values()] == [
        (p.name, p.kind, p.default) for p in parameters
    ]


@pytest.mark.parametrize("command", ["read", "ask", "demo"])
def test_options_on_the_api_page_are_those_of_the_command(command):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    cli = page.partition("## The command line")[2]
    common, *sections = re.split(r"^### ", cli, flags=re.MULTILINE)
    section = next(text for text in sections if text.startswith(f"`infini-hf {command}"))
    # The table's rows are the command's own; the list in front is for the two that work on a memory.
    shown = dict(re.findall(r"^\| `(--[\w-]+)` \| (.*?) \|", section, flags=re.MULTILINE))
    if command != "demo":
        shown.update(dict.fromkeys(re.findall(r"^- `(--[\w-]+)`", common, flags=re.MULTILINE)))
    options = {
        option.opts[0]: option.default
        for option in typer.main.get_command(app).commands[command].params
        if option.param_type_name == "option" and option.name != "help"
    }
    assert set(shown) == set(options)
    for name, default in shown.items():
        if default and re.fullmatch(r"[\d.]+|[a-z]+", default) and default != "off":
            assert str(options[name]) in (default, f"{default}.0"), f"{command} {name}"


def test_every_command_is_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### `infini-hf (\w+)", page, flags=re.MULTILINE)) == set(
        typer.main.get_command(app).commands
    )

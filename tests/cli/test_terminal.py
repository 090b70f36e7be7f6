"""Where text goes out: any encoding and width, readers that leave, full devices; and nothing drives a terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import pwd
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.command import ATTACK, Ran, drives_a_terminal
from support.forked import Forked
from support.modules import MODULES
from support.paths import CHECKPOINT

from lowmem_bagel.cli import main, terminal
from lowmem_bagel.cli.terminal import prepared, print_json, print_table, quoted, say
from lowmem_bagel.pictures.saving import KEY

Cli = Callable[..., Ran]
PROGRAM = [sys.executable, "-c", "from lowmem_bagel.cli import main; main()"]
QUICK = ["plan", "--shape", "bagel-7b", "--vram", "24GB", "--compute-capability", "8.9"]
"""A command that prints much and imports no torch."""
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROMPT = "ein größerer 中 Kreis 😀"


def run(*arguments: str, env: dict[str, str] | None = None, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [*PROGRAM, *arguments],
        env={**os.environ, **(env or {})},
        check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """One of ours, whose settings drive a terminal."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps({"prompt": PROMPT, "plan": ATTACK, "half": "\ud800"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png", pnginfo=info)
    return tmp_path / "in.png"


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["cp1252", "cp936", "ascii", "latin-1", "utf-16", "utf-8"])
    def test_nothing_is_lost(self, monkeypatch: pytest.MonkeyPatch, picture: Path, encoding: str) -> None:
        for options in ([], ["--json"]):
            raw = io.BytesIO()
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors="strict"))
            monkeypatch.setattr(sys, "argv", ["lowmem-bagel", "inspect", str(picture), *options])
            with pytest.raises(SystemExit) as exit:
                main()
            assert exit.value.code == 0
            said = raw.getvalue().decode(encoding)
            if options:
                assert json.loads(said)["prompt"] == PROMPT
            else:
                assert said.startswith("prompt: ein gr")

    def test_in_the_c_locale(self, picture: Path) -> None:
        ran = run("inspect", str(picture), env=C_LOCALE)
        assert (ran.returncode, ran.stderr) == (0, b"")
        assert ran.stdout.startswith(rb"prompt: ein gr\xf6\xdferer \u4e2d Kreis \U0001f600")

    def test_a_prompt_is_what_was_typed_where_the_locale_has_ascii_alone(self) -> None:
        options = ["--max-new-tokens", "2", "--json", "--model", str(CHECKPOINT)]
        ran = run("ask", PROMPT, *options, env=C_LOCALE)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["prompt"] == PROMPT

    def test_a_refusal_in_ascii(self, tmp_path: Path) -> None:
        ran = run("plan", str(tmp_path / "größer\udcff"), env=C_LOCALE)
        assert ran.returncode == 2
        assert ran.stderr.startswith(b"lowmem-bagel: no such folder: ")
        assert ran.stderr.isascii()

    def test_json_is_readable_where_it_can_be(self, cli: Cli, picture: Path) -> None:
        ran = cli("inspect", picture, "--json")
        assert PROMPT in ran.out
        assert json.loads(ran.out) == {"prompt": PROMPT, "plan": ATTACK, "half": "\ud800"}


class TestWhatIsSaid:
    def test_a_file_does_not_drive_the_terminal(self, cli: Cli, picture: Path) -> None:
        for options in ([], ["--json"]):
            ran = cli("inspect", picture, *options)
            assert ran.code == 0
            assert not drives_a_terminal(ran.out)
        assert len(cli("inspect", picture).out.splitlines()) == 3

    @pytest.mark.parametrize("spoil", ["name", "value", "index"])
    def test_a_refusal_is_one_short_line(self, cli: Cli, spoilable: Path, spoil: str) -> None:
        path = spoilable
        if spoil == "name":
            path = spoilable / ATTACK.replace("/", "")
        elif spoil == "value":
            (spoilable / "llm_config.json").write_text(json.dumps({"hidden_size": ATTACK * 1000}))
        else:
            (spoilable / "ema.safetensors").unlink()
            (spoilable / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": ATTACK * 99}}))
        error = cli("inspect", path).error
        assert not drives_a_terminal(error)
        assert len(error) < 1100

    def test_arguments_and_notes(self, cli: Cli, tmp_path: Path) -> None:
        for arguments in (["ask", "what?", f"--{ATTACK}"], [ATTACK], ["plan", "--pcie", ATTACK], ["bench", ATTACK]):
            ran = cli(*arguments)
            assert ran.code == 2
            assert not drives_a_terminal(ran.err)

    def test_warnings_are_notes(self, capsys: pytest.CaptureFixture[str]) -> None:
        from lowmem_bagel.cli.console import notes_shown

        with notes_shown():
            warnings.warn(ATTACK, stacklevel=1)
        error = capsys.readouterr().err
        assert error.startswith("note: ")
        assert not drives_a_terminal(error)
        assert error.count("\n") == 1

    def test_letters_and_emoji_stay(self, capsys: pytest.CaptureFixture[str]) -> None:
        for text in ("élan", "中文，日本語", "می‌خواهم", "👩‍🚀", "1\u202f000\u00a0€", "two\nlines\tand a tab"):
            say(text)
            assert capsys.readouterr().out == text + "\n"

    def test_only_one_module_of_the_commands_says_anything(self) -> None:
        """Else something could go out that is not printable."""
        found = []
        for name, path in MODULES.items():
            if not name.startswith("lowmem_bagel.cli.") or name.endswith(".terminal"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "sys.stdout.write"):
                    found.append(f"{name}: {ast.unparse(node)}")
        assert not found


UNREAD = """
import os
reading, writing = os.pipe()
os.close(reading)
for stream in (1, 2):
    os.dup2(writing, stream)
from lowmem_bagel.cli import main
main()
"""


class TestReadersThatLeave:
    @pytest.mark.parametrize("arguments", [["--help"], QUICK, [*QUICK, "--json"], ["bench"]])
    def test_the_command_ends_quietly(self, arguments: list[str]) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        ran = run(*arguments, stdout=writing)
        os.close(writing)
        assert (ran.returncode, ran.stderr) == (0, b"")

    def test_an_answer_that_nobody_reads(self) -> None:
        """Both streams closed: the note before the work does not end it either."""
        options = ["--max-new-tokens", "2", "--model", str(CHECKPOINT)]
        assert Forked(UNREAD, ["ask", "what?", *options]).wait(60) == 0

    def test_a_reader_of_one_line_ends_a_long_listing(self) -> None:
        """Lines go out as they are said, not when the command ends."""
        process = subprocess.Popen([*PROGRAM, *QUICK], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"bagel-7b")
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stderr.close()

    def test_notes_that_nobody_reads(self, tmp_path: Path) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        ran = run("plan", str(tmp_path / "nowhere"), stderr=writing)
        os.close(writing)
        assert ran.returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
class TestFullDevices:
    @pytest.mark.parametrize("arguments", [["--help"], ["--version"], QUICK, [*QUICK, "--json"]])
    def test_stdout(self, arguments: list[str]) -> None:
        with open("/dev/full", "wb") as full:
            ran = run(*arguments, stdout=full)
        assert ran.returncode == 2
        line = b"lowmem-bagel: cannot write to stdout (No space left on device); send it somewhere else\n"
        assert ran.stderr == line

    def test_stderr(self) -> None:
        with open("/dev/full", "wb") as full:
            assert run("plan", "nowhere", stderr=full).returncode == 2
            assert run("--version", stderr=full).stdout.startswith(b"lowmem-bagel ")


@pytest.mark.parametrize(("closed", "code", "said"), [(1, 2, b"it is closed"), (2, 0, b"")])
def test_closed_before_the_program_began(closed: int, code: int, said: bytes) -> None:
    command = f'exec "$@" {closed}>&-'
    ran = subprocess.run(
        ["sh", "-c", command, "sh", *PROGRAM, "--version"], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == code
    assert said in ran.stderr
    assert ran.stdout.startswith(b"lowmem-bagel" if code == 0 else b"")


class TestSurroundings:
    def test_no_working_folder(self, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        ran = subprocess.run(
            ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *PROGRAM, "--version"],
            cwd=gone,
            capture_output=True,
            check=False,
        )
        assert ran.returncode == 2
        assert ran.stderr.startswith(b"lowmem-bagel: the working folder is gone")
        assert ran.stderr.count(b"\n") == 1

    @pytest.mark.parametrize("argument", ["a\0b", "a\ud800b"])
    def test_arguments_that_no_system_hands_on(self, cli: Cli, argument: str) -> None:
        assert "holds a character that no text has" in cli("inspect", argument).error

    @pytest.mark.parametrize("home", [None, "/proc/nowhere"])
    def test_no_home(self, monkeypatch: pytest.MonkeyPatch, cli: Cli, home: str | None) -> None:
        """None at all, of a user whom the system does not know; and one that cannot be written to."""

        def unknown(*_: object) -> None:
            raise KeyError

        for name in ("getpwuid", "getpwnam"):
            monkeypatch.setattr(pwd, name, unknown)
        if home is None:
            monkeypatch.delenv("HOME", raising=False)
        else:
            monkeypatch.setenv("HOME", home)
        ran = cli("ask", "what?", "--max-new-tokens", 2, "--model", CHECKPOINT)
        assert ran.code == 0, ran.err


def in_a_terminal(columns: int, *command: str, **env: str) -> str:
    """What a terminal of this width is sent by a program."""
    import fcntl
    import struct
    import termios

    inner, outer = pty.openpty()
    fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "TERM")}
    process = subprocess.Popen(command, stdout=outer, stderr=outer, stdin=outer, env={**kept, "TERM": "xterm", **env})
    os.close(outer)
    said = b""
    while True:
        try:
            piece = os.read(inner, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        said += piece
    os.close(inner)
    assert process.wait(timeout=60) == 0, said
    return said.decode()


SAYS_AND_SHOWS = """
from lowmem_bagel.cli.console import byte_bars
from lowmem_bagel.cli.terminal import prepared, say
with prepared():
    say("ready", "bold green")
    with byte_bars() as show:
        show("Loading \\x1b[2J", 1, 2, "now \\x1b[2J")
"""


WIDTHS = (1, 10, 80, 10_000)
RESIZED = f"""
import fcntl, struct, termios
from lowmem_bagel.cli import main
for columns in {WIDTHS}:
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        main()
    except SystemExit as exit:
        assert exit.code == 0
    print("{{OVER}}")
"""


class TestTerminals:
    def test_any_width(self) -> None:
        """In one process, which looks how wide its terminal is as often as it says something."""
        *said, nothing = in_a_terminal(80, sys.executable, "-c", RESIZED, *QUICK).split("{OVER}\r\n")
        assert (len(said), nothing) == (len(WIDTHS), "")
        for text in said:
            assert "Traceback" not in text
            assert "…" not in text
            for word in ("generate", "denoise", "21.21 GB", "attention = "):
                assert word in text

    @pytest.mark.parametrize(("columns", "env"), [(1, {}), (80, {}), (80, {"NO_COLOR": "1"}), (80, {"TERM": "dumb"})])
    def test_colours_and_bars_where_they_are_wanted(self, columns: int, env: dict[str, str]) -> None:
        said = in_a_terminal(columns, sys.executable, "-c", SAYS_AND_SHOWS, **env)
        assert ("\x1b[1;32m" in said) == (not env)
        assert ("\x1b[?25l" in said) == (env.get("TERM") != "dumb"), "a bar hides the cursor"
        assert "\x1b[2J" not in said


class TestTables:
    ROWS = (("name", "size", "words"), ("a", "1", "one two three four five six"), ("中文", "1,000", ""))

    def test_columns_are_aligned(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_table(self.ROWS, right=[1])
        assert capsys.readouterr().out.splitlines() == [
            "name   size  words",
            "a         1  one two three four five six",
            "中文  1,000",
        ]

    def test_the_last_is_folded_in_a_terminal(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "34")
        print_table(self.ROWS[:2])
        assert capsys.readouterr().out.splitlines() == [
            "name  size  words",
            "a     1     one two three four",
            "            five six",
        ]
        monkeypatch.setenv("COLUMNS", "30")
        print_table(self.ROWS[1:2])
        assert capsys.readouterr().out == "a  1  one two three four five\n      six\n"


def test_what_is_printed_after_a_failure_was_swallowed_still_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that probe a stream swallow what it raises."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Full())
    with prepared() as send_out:
        for attempt in (lambda: print("x"), send_out, send_out):
            with pytest.raises(terminal.OutputError, match="No space left"):
                attempt()


def test_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with prepared():
        assert sys.stdout is not before[0]
        assert sys.stderr is not before[1]
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("system", "path", "wanted"),
    [
        ("posix", "a b", "'a b'"),
        ("posix", "a'b", """'a'"'"'b'"""),
        ("posix", r"C:\a", r"'C:\a'"),
        ("nt", r"C:\models\bagel", r"C:\models\bagel"),
        ("nt", r"C:\my models", r'"C:\my models"'),
        ("nt", "a'b", "a'b"),
        ("nt", "a&b", '"a&b"'),
        ("nt", "", '""'),
    ],
)
def test_paths_are_quoted_for_the_system_at_hand(
    monkeypatch: pytest.MonkeyPatch, system: str, path: str, wanted: str
) -> None:
    monkeypatch.setattr(terminal.os, "name", system)
    assert quoted(path) == wanted


def test_json_of_every_character(capsys: pytest.CaptureFixture[str]) -> None:
    text = "-".join(map(chr, [*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10400), 0x1F600, 0xE0001]))
    print_json({"x": text})
    out = capsys.readouterr().out
    assert json.loads(out) == {"x": text}
    assert not drives_a_terminal(out)

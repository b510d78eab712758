"""What reaches the terminal: control characters are shown, a reader that goes away costs nothing, signals stop."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import copied, slope, trained

from slope_cli.distributed.signals import STOP_SIGNALS, StopFlag
from slope_cli.report.progress import Progress
from slope_cli.report.tables import Document, Table, plain_in_markdown, rows_in_markdown
from slope_cli.report.terminal import Escaped, one_row, printable

EVIL = "\x1b[31m\x07\x08\r\x9b\x7f\u202e\udcff"
SHOWN = r"\x1b[31m\x07\x08\x0d\u009b\u007f\u202e\udcff"


def run(*words: str | Path, **how: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(how.pop("env", None) or {})}  # type: ignore[call-overload]
    command = [sys.executable, "-P", "-m", "slope_cli", *map(str, words)]
    return subprocess.run(command, env=environment, text=True, **{"capture_output": "stdout" not in how, **how})  # type: ignore[call-overload, no-any-return]


def test_control_characters_are_escaped_and_text_is_not() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("é…→ 日本 👩‍💻\n\ttext") == "é…→ 日本 👩‍💻\n\ttext"
    assert one_row("a\nb\tc") == r"a\nb\tc"


def test_names_and_prompts_of_every_command_are_shown_escaped(tmp_path: Path) -> None:
    evil = EVIL.replace("\udcff", "").replace("\r", "")
    folder = copied(trained(), tmp_path).rename(tmp_path / f"run{evil}")
    results = [slope("generate", folder, f"The {evil}", "--tokens", 3), slope("plot", folder, "--out", folder / "p")]
    results += [slope("pretrain", f"x{evil}.yaml"), slope("pretrain", f"{evil}=3"), slope("check", tmp_path / evil)]
    results += [slope(f"--{evil}"), slope("compare", "--runs", folder, "--out", tmp_path / "compared")]
    for result in results:
        text = result.out + result.err
        assert r"\x1b[31m\x07" in text
        assert printable(text) == text


def test_bars_and_tables_draw_but_what_they_are_given_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2)
    progress.say(f"saved {EVIL}\nstep 3: a made-up line")
    progress.update(1, EVIL)
    progress.close()
    Document("t", [Table("t", ["name"], [[f"{EVIL}\n"]])]).show()
    out, err = capsys.readouterr()
    assert err.count("\n") == 2
    assert SHOWN in err
    assert SHOWN in out
    assert "\x1b" not in out + err
    assert rows_in_markdown(["a"], [["b\n|"]]).splitlines()[-1] == r"| b\n\| |"
    assert plain_in_markdown("# *a* [b](c) <d> `e` run-1.3b") == r"\# \*a\* \[b\](c) \<d\> \`e\` run-1.3b"


@pytest.mark.parametrize("words", [["broken"], ["--debug", "broken", "--known"]])
def test_the_traceback_of_a_defect_shows_control_characters(words: list[str]) -> None:
    code = (
        "from slope_cli import cli, errors\n"
        "@cli.app.command()\n"
        "def broken(known: bool = False) -> None:\n"
        f"    raise (errors.UsageError if known else ValueError)({EVIL!a})\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, *words], capture_output=True)
    assert done.returncode in (1, 2)
    assert b"Traceback" in done.stderr
    assert SHOWN.encode() in done.stderr
    assert not set(b"\x1b\x07\x08\r\x7f") & set(done.stderr)


def test_libraries_that_draw_reach_the_terminal_as_they_are() -> None:
    from tqdm import tqdm

    stream = io.StringIO()
    escaped = Escaped(stream, log=True)
    list(tqdm(range(2), file=escaped, disable=False))  # type: ignore[arg-type]
    assert "\r" in stream.getvalue()
    assert r"\x0d" not in stream.getvalue()
    print("\r", file=escaped)  # type: ignore[arg-type]
    assert r"\x0d" in stream.getvalue()


@pytest.mark.parametrize("words", [("recipes",), ("config", "optim"), ("recipes", "gpt2-small")])
def test_a_reader_that_has_gone_is_no_failure(words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = run(*words, stdout=writing, stderr=writing)
    os.close(writing)
    assert result.returncode == 0


def test_a_closed_stream_and_a_lost_log_are_no_failure_but_a_lost_result_is() -> None:
    with open("/dev/full", "w") as full:
        assert run("recipes", stdout=subprocess.PIPE, stderr=full).returncode == 0
        result = run("recipes", stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["error: [Errno 28] No space left on device"]
    command = [sys.executable, "-P", "-c", "import os; os.close(1); os.execv(os.sys.executable, os.sys.argv[1:])"]
    assert subprocess.run([*command, sys.executable, "-P", "-m", "slope_cli", "recipes"]).returncode == 0


def test_a_log_outlives_a_full_disk_and_a_result_does_not() -> None:
    with open("/dev/full", "w", buffering=1) as full:
        assert Escaped(full, log=True).write("step 1\n") == 7
        with pytest.raises(OSError, match="No space left"):
            Escaped(full, log=False).write("result\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_terminal_that_is_not_utf8_shows_what_it_lacks_escaped() -> None:
    result = run("config", "compare→é", env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 2
    assert r"compare\u2192\xe9: unknown key" in result.stderr
    script = "from slope_cli.cli import app, main; app.command('say')(lambda: print('→')); main()"
    command = [sys.executable, "-P", "-c", script, "say"]
    said = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "\\u2192\n")


def test_bytes_that_are_no_text_are_refused_in_prompts_and_values() -> None:
    assert slope("generate", trained(), "The \udcff").err == "error: prompt: is not text in UTF-8\n"
    assert slope("pretrain", "log.sample_prompt=\udcff", "--dry-run").err.endswith(": is not text in UTF-8\n")


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_stops_once_and_one_that_was_ignored_stays_ignored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        os.kill(os.getpid(), number)
        assert stop.name == number.name
    assert signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), number)
            assert stop.name == ""
            assert signal.getsignal(number) is signal.SIG_IGN
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_the_signals_of_terminals_and_batch_systems_stop() -> None:
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2} == set(STOP_SIGNALS)


@pytest.mark.parametrize("moment", ["typer", "omegaconf", "yaml"])
def test_an_interrupt_while_the_command_is_imported_is_no_traceback(moment: str) -> None:
    """The interrupt comes in the import of a library, as one in the first half second would."""
    script = (
        "import importlib.abc, os, signal, sys\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {moment!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from slope_cli.__main__ import main\n"
        "sys.argv = ['slope', 'recipes']\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")

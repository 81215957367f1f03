"""Ctrl-C outside the steps of a run: in the background, while a command starts, and in the demo."""

import os
import signal

import pytest

from tests.support.interruptions import WEIGHTS, ctrl_c, heeded, printed_command  # noqa: F401 (a fixture)
from training import commands
from training.__main__ import main
from training.checkpoints.checkpoint import list_checkpoints
from training.minimal import demonstrate, loop
from training.stopping import INTERRUPTED, StopRequest, stop_on_interrupt


def test_what_runs_in_the_background_ignores_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = StopRequest()
    with stop_on_interrupt(request):
        ctrl_c(None, None)
    assert not request.requested


@pytest.mark.parametrize("command", ["train", "merge", "export", "plan"])
def test_ctrl_c_while_a_command_starts_is_one_line(monkeypatch, capsys, command):
    monkeypatch.setattr(commands.importlib, "import_module", lambda *names: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        getattr(commands, command)()
    assert ended.value.code == INTERRUPTED and capsys.readouterr().err == "\ninterrupted: nothing was done\n"


@pytest.mark.slow
def test_ctrl_c_in_the_demo_saves_what_continues_to_the_same_bits(tmp_path, monkeypatch, capsys):
    flags = ["--max_steps", "4", "--batch_size", "2", "--eval_step", "0", "--learning_rate", "0"]
    summed = loop.summed_loss

    def interrupted(*args):
        if not done:
            done.append(ctrl_c(None, None))
        return summed(*args)

    done = []
    monkeypatch.setattr(demonstrate, "evaluate", lambda *args: {"loss": 0.0, "answers": [""] * 200, "match": 0.9})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "summed_loss", interrupted)
        main([*flags, "--output_dir", str(tmp_path / "stopped")])
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-1"]
    for words in (printed_command(capsys.readouterr().out), [*flags, "--output_dir", str(tmp_path / "whole")]):
        with pytest.raises(SystemExit, match="did not learn"):
            main(words)
    stopped, whole = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("stopped", "whole"))
    assert stopped == whole

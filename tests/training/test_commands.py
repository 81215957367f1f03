"""The smaller commands answer a mistake in one line, as `dora-train` does."""

import importlib

import pytest

NEEDED = {"merge": "--adapter, --output_dir", "export": "--adapter, --output_dir"}


@pytest.mark.parametrize("command", ["merge", "export", "plan"])
def test_a_mistake_is_one_line(command, capsys):
    main = importlib.import_module(f"training.{command}").main
    with pytest.raises(SystemExit) as stopped:
        main(["--nothing", "1", "--adapter", "a", "--output_dir", "b"] if command in NEEDED else ["--nothing", "1"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"python -m training.{command}: error: unrecognized arguments: --nothing 1")


@pytest.mark.parametrize("command", NEEDED)
def test_what_is_missing_is_named_once(command, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"training.{command}").main([])
    said = capsys.readouterr().err
    assert said == f"python -m training.{command}: error: the following arguments are required: {NEEDED[command]}\n"

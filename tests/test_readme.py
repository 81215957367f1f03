"""The README's quickstarts run as printed."""

import re
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_quickstarts_run_as_printed(tmp_path, monkeypatch, capsys):
    """Both in one process and from the top of the tree, as a reader would: the second uses the first's imports."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "training").symlink_to(ROOT / "training")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block, layer in zip(blocks, ("DoraLinear", "FusedLinear")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exec(block, names)
        assert not any(type(module).__name__ == layer for module in names["model"].modules()), "merged, or given back"
        assert {path.name for path in (tmp_path / "out/adapter").iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.endswith(": fused") for line in lines)

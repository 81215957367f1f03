"""The source distribution, the wheel built from it, and environments that they are installed in, without a network."""

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def checked(*words, **options) -> str:
    """What a process prints. Raises AssertionError with all of it if the process fails."""
    ended = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def built(what: str, tree: Path, output: Path) -> Path:
    """The path of the "sdist", "wheel" or "editable" wheel that setuptools makes of a source tree."""
    code = f"import sys, setuptools.build_meta as b; print(b.build_{what}(sys.argv[1]))"
    output.mkdir(exist_ok=True)
    return output / checked(sys.executable, "-c", code, output, cwd=tree).splitlines()[-1]


def own_files() -> list[str]:
    """The files of the clone, or of an unpacked sdist, by their paths from its root."""
    if (ROOT / ".git").exists():
        names = checked("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    else:
        names = (ROOT / "dora_kernels.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def copied_tree(folder: Path) -> Path:
    """A copy of them, in which building leaves its traces."""
    for name in own_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def unpacked(sdist: Path, folder: Path) -> Path:
    """The root of the source tree in an sdist."""
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none
        archive.extractall(folder)
    (tree,) = folder.iterdir()
    return tree


def environment(folder: Path, wheel: Path) -> Path:
    """A fresh environment with this wheel; its requirements are those of the running Python. Returns its `bin`."""
    checked(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    checked(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # An editable install of the running Python is not seen through a .pth file.
    own = checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(own, "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def inside(binaries: Path) -> dict[str, str]:
    """Environment variables under which a shell finds the commands of an environment first."""
    return os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}

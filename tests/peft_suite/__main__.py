"""Runs the DoRA tests of the installed PEFT's source distribution, plain and with the engine in them, and compares.

    python -m tests.peft_suite build/peft-suite

The folder receives the source distribution (downloaded once) and the results. It fails if a test that passes on plain
PEFT does not pass with the engine, or if fewer DoRA layers ran fused than `FUSED_SHARE`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from transformers import OPTConfig, OPTForCausalLM

from tests.support.tiny_models import VOCAB, gpt2, llama

ROOT = Path(__file__).parents[2]
FUSED_SHARE = 0.78
"""Of the calls to DoRA, at least; measured: 699 of 880. The rest are grouped convolutions, which no merged weight
computes, or have several active adapters, PEFT's caching, or a base weight that trains (the views of FSDP)."""

SECONDS = 7200
"""A run that takes longer hangs."""

LAUNCHES = 2
"""Of kernels per fused call, at least: the norm and the rescaling. A fallback to the reference launches none."""


def source_distribution(folder: Path) -> Path:
    """PEFT's sources at the installed version, their tests as the package `peft_tests`: ours is called `tests`."""
    name = f"peft-{version('peft')}"
    if not (folder / name).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        subprocess.run([*download, f"peft=={version('peft')}"], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none
            archive.extractall(folder)
        tests = (folder / name / "tests").rename(folder / name / "peft_tests")
        # The distribution leaves it out, and the tests import one another.
        (tests / "__init__.py").touch()
        for file in tests.glob("*.py"):
            file.write_text(file.read_text().replace("from tests.", "from peft_tests."))
    put_stand_ins(folder / name)
    return folder / name


def put_stand_ins(working_directory: Path) -> None:
    """Tiny random models under the names that five tests load from the Hub: a folder of that name comes first. None
    of the five asks what a model knows."""
    opt = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
    )
    stand_ins = {
        "gpt2": gpt2(),
        "peft-internal-testing/opt-125m": OPTForCausalLM(opt),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": llama(),
    }
    for name, model in stand_ins.items():
        model.save_pretrained(working_directory / name)


def run(sources: Path, engine: str, workers: int, selection: str) -> Path:
    """Runs the selection on `engine` "off", "reference" or "triton"; the path of the JUnit file it leaves.

    Without the Hub, so that the same tests can pass everywhere; `HF_HUB_OFFLINE=0` asks it.
    """
    results = sources.parent / f"{engine}.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "peft_tests", "-k", selection, "-n", str(workers)]
    command += ["-p", "tests.peft_suite.plugin", "--engine", engine, f"--junitxml={results.resolve()}"]
    # It holds no DoRA test, and loads a data set from the Hub when it is imported.
    command += ["--ignore", "peft_tests/test_vision_models.py"]
    # An error in PEFT's configuration: transformers deprecated what this PEFT still asks for.
    command += ["-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"HF_HUB_OFFLINE": "1"} | os.environ
    environment |= {"PYTHONPATH": paths, "TRITON_INTERPRET": "1" if engine == "triton" else "0"}
    subprocess.run(command, cwd=sources, env=environment, check=False, timeout=SECONDS)
    return results


def read(results: Path) -> tuple[dict[str, str], Counter]:
    """{test: "passed", "skipped" or "failed"}, a file that did not load as "not loaded", and the sums of the
    plugin's counts."""
    outcomes, counts = {}, Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case}
        if any(child.get("message") == "collection failure" for child in case):
            outcomes[case.get("name")] = "not loaded"
            continue
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
        for entry in case.iter("property"):
            counts[entry.get("name")] += int(entry.get("value"))
            counts[f"tests with {entry.get('name')}"] += 1
    return outcomes, counts


def compare(engine: str, plain: dict[str, str], outcomes: dict[str, str], counts: Counter) -> list[str]:
    """What is wrong with a run of the engine "reference" or "triton", in sentences; empty if nothing is."""
    wrong = [
        f"{test} passes on plain PEFT and {outcomes.get(test, 'is missing')} with the engine"
        for test, outcome in plain.items()
        if outcome == "passed" and outcomes.get(test) != "passed"
    ]
    wrong += [f"{file} did not load: its tests were not compared" for file in plain if plain[file] == "not loaded"]
    if "passed" not in plain.values():
        wrong.append("no test passes on plain PEFT: nothing was compared")
    if counts["fused"] < FUSED_SHARE * (counts["fused"] + counts["left_to_peft"]) or not counts["fused"]:
        wrong.append(f"only {counts['fused']} calls were fused, and {counts['left_to_peft']} left to PEFT")
    if engine == "triton" and counts["launches"] < LAUNCHES * counts["fused"]:
        wrong.append(f"only {counts['launches']} kernels were launched for {counts['fused']} fused calls")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engines", nargs="+", choices=["reference", "triton"], default=["reference", "triton"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-k", dest="selection", default="dora", help="pytest's -k")
    arguments = parser.parse_args()
    sources = source_distribution(arguments.folder)

    plain, counts = read(run(sources, "off", arguments.workers, arguments.selection))
    print(f"plain PEFT: {dict(Counter(plain.values()))}, {dict(counts)}")
    wrong = []
    for engine in arguments.engines:
        outcomes, counts = read(run(sources, engine, arguments.workers, arguments.selection))
        print(f"{engine}: {dict(Counter(outcomes.values()))}, {dict(counts)}")
        wrong += [f"{engine}: {line}" for line in compare(engine, plain, outcomes, counts)]
    print("\n".join(wrong) or "No test that passes on plain PEFT fails with the engine.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""Generated configurations and command lines. A case is a surface and a seed, for which Hypothesis makes `EXAMPLES`.

What is asked for either works, as far as it goes without a training run, or ends in a ValueError, TypeError or OSError
of the library, or the exit of a command with status 2 or a sentence: in words that name one of the fields or values
that were passed. Anything else is a failure: a KeyError, an empty message, a traceback.
"""

import hashlib
import io
import re
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from .generated import strategies
from .row import Record, Row, Verdict, failures

EXAMPLES, LEAST = 50, 2000
CASES = {"config": 9, "apply": 9, "flags": 12, "yaml": 8, "plan": 6, "merge": 5, "export": 5}
INTERNAL = ("Traceback", "object has no attribute", "unsupported operand", "not subscriptable", "unexpected keyword")
INTERNAL += ("not supported between", "not iterable", "cannot unpack", "expected str, bytes")
"""What Python says by itself."""


def run(case: str) -> dict:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    surface, number = case.split("-")
    outcomes, failed, made = {"examples": 0, "worked": 0, "refused": 0}, [], []

    @seed(int(number))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies()[surface])
    def examples(asked):
        outcomes["examples"] += 1
        made.append(hashlib.sha256(f"{surface} {asked!r}".encode(errors="replace")).hexdigest()[:16])
        try:
            outcomes["refused" if is_refused(surface, asked) else "worked"] += 1
        except AssertionError as error:
            failed.append(str(error))

    # What could be the hub's is not asked for: the answer is slow, and another where there is no net.
    with warnings.catch_warnings(), mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        warnings.simplefilter("ignore")
        examples()
    assert not failed, f"{len(failed)} of {outcomes['examples']}: " + "\n".join(failed[:5])
    return outcomes | {"made": made}


def is_refused(surface: str, asked) -> bool:
    """Whether it was refused, in words that help."""
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            ATTEMPTS[surface](asked)
    except (ValueError, TypeError, OSError) as error:
        assert type(error) in (ValueError, TypeError) or isinstance(error, OSError), f"{asked}: {type(error).__name__}"
        check_words(asked, str(error))
    except SystemExit as ended:
        # 2 is argparse's, whose words went to the standard error, after a usage that lists every flag.
        words = said.getvalue().rpartition("error: ")[2] if ended.code == 2 else ended.code
        assert isinstance(words, str), f"{asked}: ended with {ended.code}"
        check_words(asked, words)
    except Exception as error:
        raise AssertionError(f"{asked}: {type(error).__name__}: {error}") from error
    else:
        return False
    return True


def check_words(asked, words: str) -> None:
    """It names a field, a flag or a value that was passed, or the flag that is missing."""
    assert len(words) > 20, f"{asked}: says only {words!r}"
    assert not any(part in words for part in INTERNAL), f"{asked}: says {words}"
    named = asked if isinstance(asked, dict) else {word.partition("=")[0]: word.partition("=")[2] for word in asked}
    flat = [part for value in named.values() if isinstance(value, (list, dict)) for part in value]
    passed = [*named, *(name.replace("--lora_", "") for name in map(str, named)), *map(str, named.values()), *flat]
    passed += [name.strip("-").replace("_", " ") for name in map(str, named) if "_" in name]
    if "text" in named:  # all that was passed is a file
        passed.append("--config")
    missing = re.search("(is needed as well|are required)", words) and re.search(r"--\w", words)
    assert missing or any(names(words, str(name)) for name in passed), f"{asked}: says {words}"


def names(words: str, passed: str) -> bool:
    """Whether it stands there as a word of its own: one of less than three letters, only in quotes or as a flag."""
    if re.search(rf"(?<!\S){re.escape(passed)}(?!\S)", words) and passed.startswith("-"):
        return True
    passed = passed.lstrip("-")[:40]
    if not passed:
        return False
    spellings = {passed, repr(passed)[1:-1]}
    quoted = any(f"{quote}{spelling}{quote}" in words for quote in "`'\"" for spelling in spellings)
    whole = rf"(?<!\w){re.escape(passed)}(?!\w)" if len(passed) < 40 else re.escape(passed)
    return quoted or f"--{passed}" in words or (len(passed) >= 3 and re.search(whole, words) is not None)


def _config(asked: dict) -> None:
    import dora_kernels as dk

    dk.DoraConfig.from_dict(asked)


def _apply(asked: dict) -> None:
    import dora_kernels as dk
    from tests.support.tiny_models import FAMILIES

    fields = dict(asked)
    family = fields.pop("family")
    dk.apply_dora(FAMILIES[family](), dk.DoraConfig(**fields))


def _flags(asked: list[str]) -> None:
    from training.flags import parse_flags
    from training.model.base_model import check_targets

    flags, is_demo = parse_flags(asked)
    flags.check()
    if not is_demo and Path(flags.base_model).is_dir() and not flags.init_adapter:
        check_targets(flags.base_model, flags.dora)


def _yaml(asked: dict) -> None:
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_text(
            asked["text"] if "text" in asked else yaml.safe_dump(asked, allow_unicode=True), encoding="utf-8"
        )
        _flags(["--config", str(path)])


def _plan(asked: list[str]) -> None:
    from training.plan import main

    main(asked)


def _merge(asked: list[str]) -> None:
    from training.merge import main

    with tempfile.TemporaryDirectory() as folder:
        main([word.replace("OUT", f"{folder}/out") for word in asked])


def _export(asked: list[str]) -> None:
    from training.export import main

    with tempfile.TemporaryDirectory() as folder:
        main([word.replace("OUT", f"{folder}/out") for word in asked])


ATTEMPTS = {"config": _config, "apply": _apply, "flags": _flags, "yaml": _yaml, "plan": _plan}
ATTEMPTS |= {"merge": _merge, "export": _export}


def judge(records: list[Record]) -> Verdict:
    """Counts what differs in what is asked for."""
    failed = failures(records)
    total, refused = (sum(record.get(name, 0) for record in records) for name in ("examples", "refused"))
    distinct = len({made for record in records for made in record.get("made", ())})
    text = f"{distinct:,} distinct in {total:,}: {total - refused:,} worked, "
    text += f"{refused:,} refused by a typed error that names what was passed"
    text += f"; {len(failed)} batches of {EXAMPLES} with a failure" if failed else ""
    return Verdict(text, distinct >= LEAST and not failed)


ROW = Row(
    what="generated configurations and command lines (Hypothesis)",
    target=f"{LEAST:,}; typed errors with a remedy only",
    cases=lambda: [f"{surface}-{number}" for surface, count in CASES.items() for number in range(count)],
    run=run,
    judge=judge,
)

"""Generated configurations and command lines. A case is a surface and a seed, for which Hypothesis makes `EXAMPLES`.

What is asked for either works, as far as it goes without a training run, or ends in a ValueError, TypeError or OSError
of the library, or the exit of a command with status 2 or a sentence: in words that name one of the fields or values
that were passed. Anything else is a failure: a KeyError, an empty message, a traceback.
"""

import functools
import io
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from .row import Record, Row, Verdict, failures

EXAMPLES = 50
CASES = {"config": 8, "apply": 6, "flags": 10, "yaml": 6, "plan": 4, "merge": 3, "export": 3}
INTERNAL = ("Traceback", "object has no attribute", "unsupported operand", "not subscriptable", "unexpected keyword")


def run(case: str) -> dict:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    surface, number = case.split("-")
    outcomes, failed = {"examples": 0, "worked": 0, "refused": 0}, []

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
        try:
            outcomes["refused" if is_refused(surface, asked) else "worked"] += 1
        except AssertionError as error:
            failed.append(str(error))

    # What could be the hub's is not asked for: the answer is slow, and another where there is no net.
    with warnings.catch_warnings(), mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        warnings.simplefilter("ignore")
        examples()
    assert not failed, f"{len(failed)} of {outcomes['examples']}: " + "\n".join(failed[:5])
    return outcomes


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
        # 2 is argparse's, whose words went to the standard error.
        words = said.getvalue() if ended.code == 2 else ended.code
        assert isinstance(words, str), f"{asked}: ended with {ended.code}"
        check_words(asked, words)
    except Exception as error:
        raise AssertionError(f"{asked}: {type(error).__name__}: {error}") from error
    else:
        return False
    return True


def check_words(asked, words: str) -> None:
    assert len(words) > 20, f"{asked}: says only {words!r}"
    assert not any(part in words for part in INTERNAL), f"{asked}: says {words}"
    named = asked if isinstance(asked, dict) else {word.partition("=")[0].lstrip("-"): word for word in asked}
    passed = [*map(str, named), *(str(value) for value in named.values())]
    flat = [str(part) for value in named.values() if isinstance(value, (list, dict)) for part in value]
    # A module that is missing or unfit is named by its own name; a file by its path.
    # A flag that is missing is named, too.
    names = [*passed, *flat, "module", " is needed as well", "are required"]
    assert any(name and (name in words or name[:40] in words) for name in names), f"{asked}: says {words}"


def _config(asked: dict) -> None:
    import dora_kernels as dk

    dk.DoraConfig.from_dict(asked)


def _apply(asked: dict) -> None:
    import dora_kernels as dk
    from tests.tiny_models import FAMILIES

    fields = dict(asked)
    family = fields.pop("family")
    dk.apply_dora(FAMILIES[family](), dk.DoraConfig(**fields))


def _flags(asked: list[str]) -> None:
    from training.base import check_targets
    from training.flags import parse_flags

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


@functools.cache
def strategies() -> dict:
    """What is asked for, by surface: mostly sound values, and one or several that are not."""
    from dataclasses import fields

    from hypothesis import strategies as st

    import dora_kernels as dk
    from training import demo
    from training.flags import Flags

    names = st.sampled_from(
        ["q_proj", "v_proj", "query", "c_attn", "q", "mlp", "lm_head", "embed_tokens", "nope", "layers"]
    )
    text = st.text(max_size=12)
    wild = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(), text, st.lists(text, max_size=2), st.just({}),
        st.dictionaries(text, st.one_of(st.integers(), text), max_size=2), st.just(10**400), st.tuples(st.integers()),
    )  # fmt: skip
    patterns = st.sampled_from(["all-linear", ".*q_proj", "(", "", ".*", r".*\.(query|value)", "[", "q_proj"])
    targets = st.one_of(st.just("all-linear"), st.lists(names, max_size=3), patterns)
    sound = {
        "r": st.integers(1, 9),
        "lora_alpha": st.one_of(st.integers(1, 64), st.floats(0.1, 64)),
        "lora_dropout": st.floats(0, 0.99),
        "target_modules": targets,
        "exclude_modules": st.one_of(st.none(), st.lists(names, max_size=2), patterns),
        "use_rslora": st.booleans(),
        "rank_pattern": st.one_of(st.none(), st.dictionaries(names, st.integers(0, 9), max_size=2)),
        "alpha_pattern": st.one_of(st.none(), st.dictionaries(names, st.floats(), max_size=2)),
        "modules_to_save": st.one_of(st.none(), st.lists(names, max_size=2)),
        "dropout_mode": st.sampled_from(["lora", "peft", "both"]),
        "space": st.sampled_from(["auto", "token", "weight", "x"]),
        "impl": st.sampled_from(["auto", "triton", "reference", "cuda"]),
        "rounding": st.sampled_from(["dithered", "nearest", "up"]),
        "nf4_parity": st.booleans(),
    }
    assert sound.keys() == {field.name for field in fields(dk.DoraConfig)}
    unsound = st.dictionaries(st.one_of(st.sampled_from(list(sound)), st.sampled_from(["rank", "alpha", "R"])), wild)
    config = st.builds(lambda good, bad: good | bad, st.fixed_dictionaries({}, optional=sound), unsound)
    families = st.sampled_from(["llama", "gpt2", "bert", "t5"])
    apply = st.fixed_dictionaries({"family": families}, optional=sound)

    # A command line of words that a shell can pass: no NUL, no lone surrogates.
    word = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=10)
    number = st.one_of(st.integers(-2, 10**20).map(str), st.floats().map(str), word, st.just("1e3"), st.just("٣"))
    base, data = str(demo.BASE), str(demo.DATA / "train.jsonl")
    places = st.sampled_from(["/nonexistent", ".", "", "a/b/c", "..", "~/x", "x.jsonl", __file__, "a" * 300])
    values = {
        "base_model": st.one_of(st.just(base), places),
        "data_path": st.one_of(st.just(data), places),
        "output_dir": st.one_of(st.just("out"), places),
        "config": places,
        "init_adapter": places,
        "device": st.sampled_from(["cpu", "cuda", "cuda:7", "tpu", "", "cpu:x", "meta"]),
        "report_to": st.one_of(st.sampled_from(["none", "wandb", "all", "nope", ","]), word),
        "lora_target_modules": st.one_of(
            names, st.just("all-linear"), st.just("q_proj,"), st.just("q_proj, v_proj"), word
        ),
        "impl": st.sampled_from(["auto", "triton", "reference", "other"]),
        "hub_model_id": word,
    }
    switch = st.sampled_from(["", "true", "false", "yes", "2", "maybe"])
    kinds = {field.name: values.get(field.name, switch if field.type is bool else number) for field in fields(Flags)}

    def words(kinds: dict, required: dict | None = None):
        """Some flags with values, in one of the two spellings, after those that are needed."""
        one = st.one_of(
            *(
                st.one_of(value.map(lambda v, n=name: [f"--{n}={v}"]), value.map(lambda v, n=name: [f"--{n}", str(v)]))
                for name, value in kinds.items()
            ),
            st.sampled_from([["--loraR", "3"], ["--lora_rank=3"], ["stray"], ["--"], ["-x"], ["--no_use_dora"]]),
            st.sampled_from([["--no-fused"], ["--packing"], ["--quantize"], ["--resume"], ["--use_peft"]]),
        )
        head = [word for name, value in (required or {}).items() for word in (f"--{name}", value)]
        return st.lists(one, max_size=4).map(lambda found: [*head, *(word for pair in found for word in pair)])

    paths = {"base_model": base, "data_path": data}
    # HfArgumentParser would print help, and end with 0.
    flags = st.one_of(words(kinds), words(kinds, paths), words(kinds, paths))
    yaml_values = st.dictionaries(
        st.one_of(st.sampled_from(list(kinds)), st.sampled_from(["lora_rank", "LR", 3])), wild
    )
    yaml_texts = st.one_of(
        text, st.sampled_from(["a: [", "- x", "1", "", "a: &a *a", "? [a]\n: b", "x: !!python/none"])
    )
    safe = yaml_values.map(lambda found: {name: _plain(value) for name, value in found.items()} | paths)
    yaml_ = st.one_of(safe, yaml_texts.map(lambda content: {"text": content}))
    plan = words(
        {
            **{name: kinds[name] for name in ("cutoff_len", "batch_size", "lora_r", "lora_target_modules")},
            "base_model": st.one_of(st.just(base), st.just(f"{base}/config.json"), places),
            "card": number,
        }
    )
    adapters = st.one_of(st.just(str(adapter())), st.just(str(adapter())), places)
    ends = {"adapter": adapters, "base_model": st.one_of(st.just(base), places)}
    outputs = st.one_of(st.just("OUT"), st.just("OUT"), st.just(__file__), st.just("/proc/x"))
    merge = words(ends | {"output_dir": outputs, "lora_r": number})
    export = words(ends | {"output_dir": outputs, "to": st.sampled_from(["merged", "lora", "gguf"]), "rank": number})
    return {"config": config, "apply": apply, "flags": flags, "yaml": yaml_, "plan": plan} | {
        "merge": merge,
        "export": export,
    }


def _plain(value):
    """What YAML can hold: no tuples."""
    return list(value) if isinstance(value, tuple) else value


@functools.cache
def adapter() -> Path:
    """A small adapter of the demo's base, until the process ends."""
    from transformers import AutoModelForCausalLM

    import dora_kernels as dk
    from training import demo

    adapter.folder = tempfile.TemporaryDirectory()
    model = AutoModelForCausalLM.from_pretrained(demo.BASE)
    dk.save_adapter(dk.apply_dora(model, dk.DoraConfig(r=2, target_modules=["q_proj"])), adapter.folder.name)
    return Path(adapter.folder.name)


def judge(records: list[Record]) -> Verdict:
    failed = failures(records)
    total, refused = (sum(record.get(name, 0) for record in records) for name in ("examples", "refused"))
    text = f"{total:,}: {total - refused:,} worked, {refused:,} refused by a typed error that names what was passed"
    text += f"; {len(failed)} batches of {EXAMPLES} with a failure" if failed else ""
    return Verdict(text, total >= 2000 and not failed)


ROW = Row(
    what="generated configurations and command lines (Hypothesis)",
    target="2,000; typed errors with a remedy only",
    cases=lambda: [f"{surface}-{number}" for surface, count in CASES.items() for number in range(count)],
    run=run,
    judge=judge,
)

"""What is asked for in the row `command_lines`: configurations, YAML files and command lines, by Hypothesis."""

import functools
import tempfile
from pathlib import Path


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
        "merge_aware": st.booleans(),
        "fuse_blocks": st.sampled_from(["auto", False, "on"]),
        "target_parameters": st.one_of(st.none(), st.lists(names, max_size=2)),
        "expert_rank": st.sampled_from(["full", "active", "half"]),
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
    merge_kinds = ends | {"output_dir": outputs, "lora_r": number}
    export_kinds = ends | {"output_dir": outputs, "to": st.sampled_from(["merged", "lora", "gguf"]), "rank": number}
    enough = {"adapter": str(adapter()), "base_model": base, "output_dir": "OUT"}
    merge, export = (st.one_of(words(each), words(each, enough)) for each in (merge_kinds, export_kinds))
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

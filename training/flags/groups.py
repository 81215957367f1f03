"""The flags by group, each with its default, its line in `--help`, and the names that other programs have for it."""

from dataclasses import dataclass, field
from typing import Literal


def flag(default, text: str, *familiar: str):
    """A dataclass field with a default and its line in `--help`. `familiar` names are understood as well."""
    spellings = {spelling for name in familiar for spelling in (f"--{name}", f"--{name.replace('_', '-')}")}
    return field(default=default, metadata={"help": text, "aliases": sorted(spellings)})


@dataclass
class Run:
    """What runs, and where its files go."""

    _argument_group_name = "the run"

    base_model: str = flag(
        "", "hub id or folder of a Hugging Face causal language model", "model", "model_name_or_path", "model_id"
    )
    task: Literal["sft", "dpo", "kto", "orpo"] = flag(
        "sft", "learn texts, or preferences by one of TRL's trainers, which build the adapter with PEFT"
    )
    output_dir: str = flag("out/run", "where the adapter, checkpoints, metrics.jsonl and loss.png go", "output")
    config: str = flag("", "YAML file of flags; a flag on the command line wins over it")
    resume: bool = flag(False, "continue from the newest checkpoint in --output_dir that verifies")
    init_adapter: str = flag("", "folder of an adapter to continue from; it decides rank, alpha and targets")
    save_step: int = flag(100, "steps between checkpoints; 0: never", "save_steps")
    report_to: str = flag("none", "comma-separated trackers, as transformers knows them: wandb, tensorboard, ...")
    hub_model_id: str = flag("", "repository on the hub, for --push_to_hub")
    push_to_hub: bool = flag(False, "upload the adapter when the run has ended")
    trust_remote_code: bool = flag(False, "run code that the model's repository brings")


@dataclass
class Data:
    """The rows."""

    _argument_group_name = "data"

    data_path: str = flag(
        "",
        "hub id, folder, or .jsonl, .json, .csv, .tsv, .parquet or .txt file (.gz too); several: a.jsonl,b.csv=0.5",
        *("data", "dataset", "dataset_name", "train_file"),
    )
    data_config: str = flag("", "configuration of a data set on the Hub", "dataset_config", "dataset_config_name")
    data_split: str = flag("", "split of a data set on the Hub to train on", "dataset_split")
    columns: str = flag("", "the data's columns by the names that are read: prompt=frage,completion=antwort")
    prompt_template: str = flag("", "the prompt, with {column} places: 'Translate: {source}'")
    cutoff_len: int = flag(
        512,
        "the most tokens of a row; --long_rows says what happens to longer ones",
        *("max_length", "max_seq_length", "max_seq_len", "sequence_len"),
    )
    long_rows: Literal["truncate", "drop"] = flag(
        "truncate", "longer rows lose their end and are listed in cut_rows.jsonl, or are left out"
    )
    val_set_size: float | None = flag(
        None,
        "rows held out where the data brings no split, or below 1 their share; default: a tenth, at most 500; 0: none",
    )
    bad_row_limit: float = flag(
        0.05, "share of unusable rows above which the run stops before training; long rows do not count"
    )
    packing: bool = flag(False, "pack several rows into one sequence of cutoff_len tokens", "sample_packing")
    assistant_only_loss: bool = flag(False, "learn the assistant's turns only (column `messages` or `conversations`)")


@dataclass
class Training:
    """The optimizer's steps."""

    _argument_group_name = "training"

    num_epochs: float = flag(1, "passes over the training rows; 0.5 is half of one", "epochs", "num_train_epochs")
    max_steps: int = flag(0, "optimizer steps; above 0 it replaces --num_epochs")
    batch_size: int = flag(
        1,
        "rows per forward pass",
        *("per_device_train_batch_size", "micro_batch_size", "train_batch_size"),
    )
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step", "gradient_accumulation")
    keep_weights: bool = flag(
        False, "keep merged weights over the passes of a step: less time, memory of the adapted weights in 16 bits"
    )
    learning_rate: float = flag(
        3e-4, "peak of the schedule; PEFT's DoRA example has 3e-4, ranks above 64 want less", "lr"
    )
    warmup_ratio: float = flag(0.05, "share of the steps in which the learning rate rises")
    eval_step: int | None = flag(
        None, "steps between evaluations; 0: never; default: as often as costs a tenth of training", "eval_steps"
    )
    early_stopping: int = flag(
        0, "stop after so many evaluations without a lower loss; 0: never", "early_stopping_patience"
    )
    seed: int = flag(0, "decides initialization, data order and dropout")
    set: list[str] = field(
        default_factory=list,
        metadata={
            "help": "name=value ...: any other field of TRL's configuration, such as weight_decay=0.1",
            "action": "extend",
        },
    )


@dataclass
class Adapter:
    """The adapter. Names and meanings are PEFT's."""

    _argument_group_name = "the adapter"

    use_dora: bool = flag(True, "DoRA; --no_use_dora trains plain LoRA, through PEFT")
    use_peft: bool = flag(False, "build the adapter with PEFT, and run it fused")
    fused: bool = flag(True, "--no-fused runs PEFT's own code: the baseline to compare with")
    lora_r: int = flag(16, "rank of the adapter", "lora_rank", "rank")
    lora_alpha: float = flag(32, "the adapter's update is scaled by lora_alpha / lora_r")
    use_rslora: bool = flag(False, "scale by lora_alpha / sqrt(lora_r)", "rslora")
    lora_dropout: float = flag(0.0, "dropout of the adapter's input")
    dropout_mode: Literal["lora", "peft"] = flag(
        "lora", "dropout on the LoRA branch alone, or PEFT's, which --use_peft always has"
    )
    lora_target_modules: str = flag(
        "all-linear",
        "comma-separated module names; default: every linear layer but the head",
        *("target_modules", "lora_target"),
    )
    lora_target_parameters: str = flag(
        "", "comma-separated fused parameters, the stacks of experts: mlp.experts.down_proj", "target_parameters"
    )
    expert_rank: Literal["full", "active"] = flag(
        "full", "each expert's rank: lora_r, or lora_r over the number of experts that a token goes to"
    )
    exclude_modules: str = flag("", "comma-separated module names that get no adapter")
    modules_to_save: str = flag(
        "", "comma-separated modules to train in full and save with the adapter", "lora_modules_to_save"
    )
    merge_aware: bool = flag(
        False, "train with the merged weight quantised in the base's format, as `export --to` that format writes it"
    )
    rank_pattern: str = flag("", "other ranks by module name: q_proj=32,v_proj=8")
    alpha_pattern: str = flag("", "other alphas by module name")


@dataclass
class Hardware:
    """Speed and memory."""

    _argument_group_name = "speed and memory"

    device: str = flag("", "cpu, cuda or cuda:N; default: the first GPU, or the CPU where there is none")
    quantize: bool = flag(False, "load the base in 4 bits (NF4, double quantisation)", "load_in_4bit")
    activation_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, more time", "gradient_checkpointing"
    )
    use_compile: bool = flag(False, "torch.compile the model", "torch_compile")
    use_liger: bool = flag(False, "Liger's fused linear cross-entropy (needs a GPU)", "use_liger_kernel")
    fsdp: bool = flag(False, "shard the base over the GPUs of the processes (FSDP2)")
    deepspeed: str = flag("", "DeepSpeed's configuration, a JSON file (ZeRO stage 1 or 2)")
    impl: Literal["auto", "triton", "reference"] = flag("auto", "which implementation of DoRA runs")
    space: Literal["auto", "token", "weight"] = flag("auto", "the form in which a layer runs")
    rounding: Literal["dithered", "nearest"] = flag("dithered", "how fused results are rounded to 16 bits")
    fuse_blocks: Literal["auto", "off"] = flag(
        "auto", "compute a gated MLP, and layers of one input, by one function, or each layer alone"
    )


GROUPS = (Run, Data, Training, Adapter, Hardware)

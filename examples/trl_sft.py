"""Train with TRL's SFTTrainer, which builds the PEFT DoRA model itself; a callback fuses it."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import dora_kernels as dk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="folder or Hub id")
parser.add_argument("--data", default="trl-lib/tldr", help="folder or Hub id; columns prompt and completion")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--output", default="out/sft")
args = parser.parse_args()

callback = dk.DoraKernelsCallback()
cuda = torch.cuda.is_available()
trainer = SFTTrainer(
    args.model,
    args=SFTConfig(args.output, max_steps=args.steps, learning_rate=3e-4, bf16=cuda, use_cpu=not cuda),
    train_dataset=load_dataset(args.data, split="train"),
    peft_config=LoraConfig(use_dora=True, r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[callback],
)
trainer.train()
print(callback.report)
trainer.save_model(args.output)

"""Learn preferences with TRL's DPOTrainer, which builds the PEFT DoRA model itself; a callback fuses it."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import dora_kernels as dk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="folder or Hub id")
parser.add_argument("--data", default="trl-lib/ultrafeedback_binarized", help="folder or Hub id; chosen and rejected")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--output", default="out/dpo")
args = parser.parse_args()

callback = dk.DoraKernelsCallback()
cuda = torch.cuda.is_available()
trainer = DPOTrainer(
    args.model,
    args=DPOConfig(args.output, max_steps=args.steps, learning_rate=5e-5, bf16=cuda, use_cpu=not cuda),
    train_dataset=load_dataset(args.data, split="train"),
    peft_config=LoraConfig(use_dora=True, r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[callback],
)
trainer.train()
print(callback.report)
trainer.save_model(args.output)

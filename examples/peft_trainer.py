"""Train a PEFT DoRA model in transformers' Trainer, fused by a callback; every file stays PEFT's."""

import argparse

import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import dora_kernels as dk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="folder or Hub id")
parser.add_argument("--data", default="trl-lib/tldr", help="folder or Hub id; columns prompt and completion")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--output", default="out/trainer")
args = parser.parse_args()

tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = transformers.AutoModelForCausalLM.from_pretrained(args.model)
model = get_peft_model(model, LoraConfig(use_dora=True, r=16, lora_alpha=32, target_modules="all-linear"))
rows = load_dataset(args.data, split="train")
rows = rows.map(lambda row: tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=1024))
arguments = TrainingArguments(args.output, max_steps=args.steps, learning_rate=3e-4, report_to="none")
collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
callback = dk.DoraKernelsCallback()
Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=[callback]).train()
print(callback.report)
model.save_pretrained(args.output)

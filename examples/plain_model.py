"""Fine-tune a plain transformers model in a loop of your own: DoRA layers in place, PEFT's files at the end."""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels as dk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="folder or Hub id")
parser.add_argument("--data", default="trl-lib/tldr", help="folder or Hub id; columns prompt and completion")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--output", default="out/plain")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
model = dk.apply_dora(model, dk.DoraConfig(r=16, lora_alpha=32)).train()
print(dk.explain(model, tokens=1024))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4, weight_decay=0.0)
for row in load_dataset(args.data, split="train").select(range(args.steps)):
    ids = tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=1024, return_tensors="pt").input_ids
    model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dk.save_adapter(model, args.output)

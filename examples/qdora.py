"""QDoRA: fine-tune on a base in NF4, then merge into its dequantised weights."""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import dora_kernels as dk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="folder or Hub id")
parser.add_argument("--data", default="trl-lib/tldr", help="folder or Hub id; columns prompt and completion")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--output", default="out/qdora")
args = parser.parse_args()

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=nf4, dtype=torch.bfloat16)
model = dk.apply_dora(model, dk.DoraConfig(r=16, lora_alpha=32)).train()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4, weight_decay=0.0)
for row in load_dataset(args.data, split="train").select(range(args.steps)):
    ids = tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=1024, return_tensors="pt").input_ids
    model(input_ids=ids.to(model.device), labels=ids.to(model.device)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dk.save_adapter(model, args.output)
dk.merge_dora(model, base="dequantized").save_pretrained(f"{args.output}-merged")

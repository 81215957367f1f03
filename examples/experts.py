"""Fine-tune the experts of a mixture of experts, and its linear layers, in a loop of your own."""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels as dk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B", help="folder or Hub id")
parser.add_argument("--data", default="trl-lib/tldr", help="folder or Hub id; columns prompt and completion")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--output", default="out/experts")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
model = dk.apply_dora(model, dk.DoraConfig(r=8, lora_alpha=16, target_parameters=experts)).train()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4, weight_decay=0.0)
for row in load_dataset(args.data, split="train").select(range(args.steps)):
    ids = tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=1024, return_tensors="pt").input_ids
    model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dk.save_adapter(model, args.output)

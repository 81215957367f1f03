"""Train a sentence-transformers model: PEFT's DoRA, fused by a callback; merged, any program loads what is saved."""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

import dora_kernels as dk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-Embedding-0.6B", help="folder or Hub id")
parser.add_argument("--data", default="sentence-transformers/natural-questions", help="folder or Hub id; two columns")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--output", default="out/embeddings")
args = parser.parse_args()

model = SentenceTransformer(args.model)
config = LoraConfig(use_dora=True, r=16, lora_alpha=32, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
model[0].model = get_peft_model(model[0].model, config)
callback = dk.DoraKernelsCallback()
arguments = SentenceTransformerTrainingArguments(args.output, max_steps=args.steps, learning_rate=3e-4)
rows, loss = load_dataset(args.data, split="train"), MultipleNegativesRankingLoss(model)
SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss, callbacks=[callback]).train()
print(callback.report)
model[0].model.save_pretrained(f"{args.output}/adapter")
model[0].model = model[0].model.merge_and_unload()
model.save_pretrained(f"{args.output}/merged")

"""Merge an adapter into its base: a plain checkpoint for vLLM, SGLang or llama.cpp's converters."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels as dk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="the adapter's base: folder or Hub id")
parser.add_argument("--adapter", default="out/sft", help="folder with PEFT's two files")
parser.add_argument("--output", default="out/merged")
args = parser.parse_args()

model = dk.load_adapter(AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"), args.adapter)
dk.merge_dora(model).save_pretrained(args.output)
AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
print(f"vllm serve {args.output}")

"""GRPO with Elastic Reset: torchrun --nproc_per_node 2 tutorials/two_gpus.py Qwen/Qwen3-0.6B 1000"""

import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from elastic_reset import ElasticResetCallback


def about_100_characters(completions, **kwargs):
    return [-abs(100 - len(text)) / 100 for text in completions]


model, period = sys.argv[1], int(sys.argv[2]) // 4
gpu = torch.accelerator.is_available()
sharded = dict(fsdp=True, fsdp_config=dict(version=2)) if gpu else {}  # FSDP2; on the CPU it is DDP
how = dict(max_steps=4 * period, save_steps=period, lr_scheduler_type="constant", max_completion_length=64)
arguments = GRPOConfig("runs/grpo", bf16=gpu, use_cpu=not gpu, **how, **sharded)
decay = 0.6 ** (1 / period)  # 0.6 of each reset is the start
callback = ElasticResetCallback(decay=decay, reset_every=period)
prompts = Dataset.from_list([{"prompt": "Tell me a story."}] * 1000)
GRPOTrainer(model, about_100_characters, arguments, prompts, callbacks=[callback]).train()

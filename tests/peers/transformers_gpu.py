"""Decode speed of Hugging Face transformers on one GPU at North-Mini-Code's shape, to compare with `cohort bench decode`.

Random bf16 weights made on the GPU, greedy, its dynamic cache filled by a prompt of --context tokens, no stop token:
`python transformers_gpu.py --context 8192 --batch 1 8`. A step is one `forward` and the argmax; the median is shown.
"""

import argparse
import statistics
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

SHAPE = dict(
    hidden_size=2048, num_hidden_layers=49, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    intermediate_size=768, first_k_dense_replace=1, prefix_dense_intermediate_size=3072,
    prefix_dense_sliding_window_pattern=1, num_experts=128, num_experts_per_tok=8, num_shared_experts=0,
    expert_selection_fn="sigmoid", norm_topk_prob=False, sliding_window=4096, sliding_window_pattern=4,
    vocab_size=262144, max_position_embeddings=500000, logit_scale=1.0,
    layer_types=["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(49)],
)


def steps(model, batch, context, count):
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, 200_000, (batch, context), device="cuda")
    for start in range(0, context, 2048):
        part = ids[:, start : start + 2048]
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token, times = logits[:, -1].argmax(-1, keepdim=True), []
    for _ in range(count):
        torch.cuda.synchronize()
        started = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        token.cpu()
        times.append(time.perf_counter() - started)
    return statistics.median(times[count // 4 :])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--experts", default="default")
    args = parser.parse_args()
    chosen = {} if args.experts == "default" else {"experts_implementation": args.experts}
    config = AutoConfig.for_model("cohere2_moe", **SHAPE)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa", **chosen)
    model.eval()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, experts {args.experts}, "
          f"{sum(p.numel() for p in model.parameters()) / 1e9:.1f} B parameters, {torch.cuda.get_device_name()}")
    with torch.inference_mode():
        for batch in args.batch:
            step = steps(model, batch, args.context, args.steps)
            print(f"batch {batch}, context {args.context}: {step * 1e3:.2f} ms a step, {batch / step:.1f} tok/s")


if __name__ == "__main__":
    main()

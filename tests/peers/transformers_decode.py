"""Decode speed of Hugging Face transformers on a checkpoint, to compare with `cohort bench`.

One sequence, greedy, float32, eager attention, with transformers' own cache, end-of-sequence ignored. A row is one
number of threads, one experts implementation and one driver:
  forward   the model called token by token, nothing else in the loop: the fastest transformers can be
  generate  `model.generate`, what a user of transformers calls
Decode tokens/s = (output - 1) / (time of last token - time of first token); the time to the first token is the
prefill. Best and median over the repeats are shown; on a busy machine the best is the one to compare.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

DEMO = Path(__file__).resolve().parents[2] / "crates/cli/assets/demo"
WARM_UP_TOKENS = 16


class Clock(BaseStreamer):
    """Notes when each token of `generate` arrives; the first `put` is the prompt and is not a token."""

    def __init__(self):
        self.times = []
        self.saw_prompt = False

    def put(self, value):
        if self.saw_prompt:
            self.times.append(time.perf_counter())
        self.saw_prompt = True

    def end(self):
        pass


def by_forward(model, prompt, output):
    """Greedy tokens and their arrival times, one `forward` a token."""
    cache = DynamicCache(config=model.config)
    step, tokens, times = torch.tensor([prompt]), [], []
    while len(tokens) < output:
        logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.append(step.item())
        times.append(time.perf_counter())
    return tokens, times


def by_generate(model, prompt, output):
    """The same through `generate`."""
    ids, clock = torch.tensor([prompt]), Clock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=output,
        do_sample=False,
        use_cache=True,
        streamer=clock,
    )
    return out[0, len(prompt) :].tolist(), clock.times


DRIVERS = {"forward": by_forward, "generate": by_generate}


def load(folder, experts):
    """The model in float32 with eager attention; `experts` "default" leaves the choice to transformers."""
    chosen = {} if experts == "default" else {"experts_implementation": experts}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **chosen)
    # No stop token: every run makes exactly the asked number of tokens.
    model.generation_config.eos_token_id = None
    return model.eval()


def measure(model, driver, prompt, output, repeats):
    """Decode tokens/s and seconds to the first token of each repeat, after a warm-up."""
    driver(model, prompt, WARM_UP_TOKENS)
    rates, firsts = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens, times = driver(model, prompt, output)
        assert len(tokens) == len(times) == output, f"{len(tokens)} tokens, {len(times)} times, {output} asked"
        rates.append((output - 1) / (times[-1] - times[0]))
        firsts.append(times[0] - start)
    return rates, firsts


def check(model, folder, cases):
    """Greedy output of the named cases of `reference.json` by both drivers; says which token differs first."""
    reference = json.loads((folder / "reference.json").read_text())["cases"]
    rows = []
    for case in cases:
        if not 0 <= case < len(reference):
            sys.exit(f"{folder / 'reference.json'} has {len(reference)} cases, there is no case {case}")
        prompt, wanted = reference[case]["prompt_ids"], reference[case]["greedy_ids"]
        for name, driver in DRIVERS.items():
            got, _ = driver(model, prompt, len(wanted))
            differ = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b), None)
            rows.append({"case": case, "driver": name, "tokens": len(wanted), "first_difference": differ})
    return rows


def cpu_name():
    """The processor as the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help="checkpoint folder (default: the demo model)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--prompt", type=int, default=64, help="prompt length in tokens (default: 64)")
    parser.add_argument("--output", type=int, default=256, help="output length in tokens, at least 2 (default: 256)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random prompt ids (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs per row (default: 5)")
    parser.add_argument(
        "--experts",
        nargs="+",
        default=["default", "eager"],
        help='experts implementations: "default" or a name transformers knows, as eager, grouped_mm, batched_mm',
    )
    parser.add_argument("--check", type=int, nargs="*", default=[], help="cases of reference.json to compare first")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    if args.output < 2 or args.prompt < 1 or args.repeats < 1 or min(args.threads) < 1:
        parser.error("--output must be at least 2; --prompt, --repeats and --threads at least 1")
    return args


def measured_rows(model, experts, args):
    """One row per number of threads and driver."""
    seeded = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(0, model.config.vocab_size, (args.prompt,), generator=seeded).tolist()
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, driver in DRIVERS.items():
            rates, firsts = measure(model, driver, prompt, args.output, args.repeats)
            yield {
                "threads": threads,
                "experts": experts,
                "experts_resolved": model.config._experts_implementation,
                "driver": name,
                "decode_tokens_per_s_best": round(max(rates), 1),
                "decode_tokens_per_s_median": round(statistics.median(rates), 1),
                "first_token_ms_best": round(min(firsts) * 1e3, 2),
            }


def print_table(report):
    print(f"transformers {report['transformers']}, torch {report['torch']}, float32, {report['cpu']}")
    lengths = f"prompt {report['prompt_tokens']} (seed {report['seed']}), output {report['output_tokens']} tokens"
    print(f"{lengths}, {report['repeats']} repeats")
    for row in report["reference"]:
        verdict = "equal" if row["first_difference"] is None else f"differ at token {row['first_difference']}"
        print(f"reference case {row['case']} ({row['experts']}, {row['driver']}): {row['tokens']} tokens {verdict}")
    print(f"{'threads':>7}  {'experts':<22}{'driver':<10}{'tokens/s best':>14}{'median':>9}{'first token ms':>16}")
    for row in report["rows"]:
        resolved = row["experts_resolved"]
        experts = row["experts"] if row["experts"] == resolved else f"{row['experts']} ({resolved})"
        print(
            f"{row['threads']:>7}  {experts:<22}{row['driver']:<10}{row['decode_tokens_per_s_best']:>14}"
            f"{row['decode_tokens_per_s_median']:>9}{row['first_token_ms_best']:>16}"
        )


@torch.inference_mode()
def main():
    args = arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, reference = [], []
    for experts in args.experts:
        model = load(args.model, experts)
        reference += [{"experts": experts, **row} for row in check(model, args.model, args.check)]
        rows += measured_rows(model, experts, args)
    report = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "prompt_tokens": args.prompt,
        "output_tokens": args.output,
        "seed": args.seed,
        "repeats": args.repeats,
        "reference": reference,
        "rows": rows,
    }
    print(json.dumps(report, indent=2)) if args.json else print_table(report)
    if any(row["first_difference"] is not None for row in reference):
        sys.exit("the greedy output differs from reference.json")


if __name__ == "__main__":
    main()

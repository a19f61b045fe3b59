"""The demo's GPT on Ray Train, compared with a plain loop: torchrun, transformers, DDP.

    python -m benchmarks.train_vs_torchrun [--rounds 5] [--steps 150] [--strategies ddp zero1 ...]

All train gpt-demo (2 workers with one thread each, bf16 autocast) on the same packed tokens, one
after the other, in one run. Compared are tokens per second once they run steadily, as the ratio of
raykiln to torchrun in each round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.runs import ROOT, median_and_range, parser, read_metrics, train
from cluster import cli

STRATEGIES: dict[str, dict[str, object]] = {
    "ddp": {},
    "compile": {"compile": "true"},
    **{
        f"zero{stage}": {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
        for stage in range(4)
    },
}
WARM_UP = 30  # steps before the clock starts: allocator, caches, the first all-reduce


def plain_loop(folder: str, steps: int) -> None:
    """Train as tutorials do: transformers' own loss, AdamW, DDP, random windows.

    Prints tokens per second.
    """
    import torch
    import torch.distributed as dist
    from transformers import GPT2Config, GPT2LMHeadModel

    from train.config import loader as configs
    from train.gpt.config import GptConfig

    config = configs.load("gpt", "gpt-demo")
    assert isinstance(config, GptConfig)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    meta = json.loads((Path(folder) / "dataset.json").read_text())
    files = [Path(folder) / shard["file"] for shard in meta["splits"]["train"]["shards"]]
    tokens = np.concatenate([np.fromfile(file, meta["dtype"]) for file in files])
    sizes, context = config.model, config.model.context
    batch_size = config.batch.global_size // dist.get_world_size()
    gpt2 = GPT2Config(
        vocab_size=meta["vocab_size"], n_positions=context,
        n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = torch.nn.parallel.DistributedDataParallel(GPT2LMHeadModel(gpt2))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    draw = np.random.default_rng(dist.get_rank())
    for step in range(steps):
        if step == WARM_UP:
            begin = time.perf_counter()
        starts = draw.integers(len(tokens) - context, size=batch_size)
        ids = torch.from_numpy(
            np.stack([tokens[start : start + context] for start in starts]).astype(np.int64)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        print((steps - WARM_UP) * config.tokens_per_step / (time.perf_counter() - begin))


def torchrun_speed(folder: str, steps: int) -> float:
    """Run `plain_loop` under torchrun and return its tokens per second."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "benchmarks.train_vs_torchrun", "--plain", folder, "--steps", str(steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def raykiln_speed(storage: str, name: str, steps: int, strategy: str) -> float:
    """Train a run and return its tokens per second after the warm-up."""
    options = {
        "steps": steps,
        "log.every": 10,
        "log.eval_every": steps,
        "log.sample_every": steps,
        "checkpoint.every": steps,
        **STRATEGIES[strategy],
    }
    run = train("gpt", "gpt-demo", storage, name, options)
    steady = [
        row["tokens_per_s"]
        for row in read_metrics(run)
        if row["step"] > WARM_UP and "tokens_per_s" in row and "loss" in row
    ]
    return statistics.harmonic_mean(steady)


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=["ddp"])
    options.add_argument("--plain", help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    steps, strategies = arguments.steps, arguments.strategies
    if arguments.plain:
        plain_loop(arguments.plain, steps)
        return 0
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as storage:
        for strategy in strategies:  # a first run prepares the data and fills the compiler's cache
            raykiln_speed(storage, f"first-{strategy}", WARM_UP + 20, strategy)
        folder = str(next(Path(storage, "data").iterdir()))
        for number in range(arguments.rounds):
            speeds = {
                strategy: raykiln_speed(storage, f"{strategy}-{number}", steps, strategy)
                for strategy in strategies
            }
            speeds["torchrun"] = torchrun_speed(folder, steps)
            rounds.append(speeds)
            line = ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in speeds.items())
            print(f"round {number}: {line}", flush=True)
    theirs = statistics.median(speeds["torchrun"] for speeds in rounds)
    for strategy in strategies:
        ours = statistics.median(speeds[strategy] for speeds in rounds)
        ratios = [speeds[strategy] / speeds["torchrun"] for speeds in rounds]
        print(
            f"| train gpt-demo, 2 workers, {strategy} | {ours:,.0f} tokens/s "
            f"| torchrun loop: {theirs:,.0f} tokens/s | {median_and_range(ratios, 2)} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

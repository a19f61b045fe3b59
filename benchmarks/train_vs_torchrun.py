"""What Ray Train and our loop cost or gain beside what one would write by hand: torchrun, transformers, DDP.

from train.gpt.config import GptConfig
    python -m benchmarks.train_vs_torchrun [--rounds 5] [--steps 150] [--strategies ddp zero1 ...]

All train the demo's GPT (gpt-demo: 2 workers, one thread each, bf16 autocast) on the same packed tokens, in turn,
in one run. The figure is tokens a second once they run steadily, ours over torchrun's, round by round.
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

from benchmarks.runs import ROOT, spread, train

STRATEGIES: dict[str, dict[str, object]] = {
    "ddp": {},
    "compile": {"compile": "true"},
    **{
        f"zero{stage}": {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
        for stage in range(4)
    },
}
WARM_UP = 30  # steps before the clock counts: allocator, caches, the first exchange of gradients


def bare(folder: str, steps: int) -> None:
    """The loop as the tutorials have it: transformers' own loss, AdamW, DDP, random windows. Prints tokens a second."""
    import torch
    import torch.distributed as dist
    from transformers import GPT2Config, GPT2LMHeadModel

    from train.config import loader as configs

    config = configs.load("gpt", "gpt-demo")
    assert isinstance(config, GptConfig)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    meta = json.loads((Path(folder) / "dataset.json").read_text())
    tokens = np.concatenate(
        [
            np.fromfile(Path(folder) / shard["file"], meta["dtype"])
            for shard in meta["splits"]["train"]["shards"]
        ]
    )
    sizes, context, share = (
        config.model,
        config.model.context,
        config.batch.global_size // dist.get_world_size(),
    )
    gpt2 = GPT2Config(
        vocab_size=meta["vocab_size"], n_positions=context, n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = torch.nn.parallel.DistributedDataParallel(GPT2LMHeadModel(gpt2))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    draw = np.random.default_rng(dist.get_rank())
    for step in range(steps):
        if step == WARM_UP:
            begun = time.perf_counter()
        starts = draw.integers(len(tokens) - context, size=share)
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
        print((steps - WARM_UP) * config.tokens_per_step / (time.perf_counter() - begun))


def by_torchrun(folder: str, steps: int) -> float:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "benchmarks.train_vs_torchrun",
        "--bare",
        folder,
        "--steps",
        str(steps),
    ]
    return float(
        subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )


def by_us(storage: str, name: str, steps: int, strategy: str = "ddp") -> float:
    options = {
        "steps": steps,
        "log.every": 10,
        "log.eval_every": steps,
        "log.sample_every": steps,
        "checkpoint.every": steps,
        **STRATEGIES[strategy],
    }
    run = train("gpt", "gpt-demo", storage, name, options)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steady = [
        row["tokens_per_s"]
        for row in rows
        if row["step"] > WARM_UP and "tokens_per_s" in row and "loss" in row
    ]
    return len(steady) / sum(1 / speed for speed in steady)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=["ddp"])
    options.add_argument("--bare", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.bare:
        bare(given.bare, given.steps)
        return
    with tempfile.TemporaryDirectory() as storage:
        for strategy in given.strategies:  # prepares the data, fills the compiler's cache
            by_us(storage, f"first-{strategy}", WARM_UP + 20, strategy)
        folder = str(next(Path(storage, "data").iterdir()))
        rounds: list[dict[str, float]] = []
        for number in range(given.rounds):
            speeds = {
                strategy: by_us(storage, f"{strategy}-{number}", given.steps, strategy)
                for strategy in given.strategies
            }
            rounds.append({**speeds, "torchrun": by_torchrun(folder, given.steps)})
            print(
                f"round {number}: "
                + ", ".join(f"{who} {speed:,.0f} tokens/s" for who, speed in rounds[-1].items()),
                flush=True,
            )
    theirs = statistics.median(speeds["torchrun"] for speeds in rounds)
    for strategy in given.strategies:
        ratios = [speeds[strategy] / speeds["torchrun"] for speeds in rounds]
        ours = statistics.median(speeds[strategy] for speeds in rounds)
        print(
            f"| train gpt-demo, 2 workers, {strategy} | {ours:,.0f} tokens/s | torchrun loop: {theirs:,.0f} tokens/s | "
            f"{spread(ratios, 2)} |"
        )


if __name__ == "__main__":
    main()

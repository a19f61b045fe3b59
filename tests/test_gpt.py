"""The GPT, and its runs on Ray (strategies: test_strategy.py; kills: test_verify.py)."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from cluster import cli, storage
from models.nets import gpt
from tests.support import workers
from train import __main__ as train
from train import launch
from train.config import loader
from train.config.sections import Config
from train.data.dataset import Dataset
from train.gpt.config import GptConfig
from train.gpt.model import build
from train.gpt.schedule import learning_rate
from train.run import checkpoint, records
from train.run.summary import Summary

DROPOUT = {"model.dropout": 0.1}
VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


# ---- the model


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return gpt.build(vocab_size=97, context=24, width=32, layers=2, heads=4, eos_token_id=0).eval()


def test_logits_and_samples_equal_those_of_transformers(
    model: GPT2LMHeadModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    prompt = ids[0, :6].tolist()
    expected = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=15,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 6:]
    assert gpt.sample(model, prompt, 15, temperature=0) == expected.tolist()
    again = gpt.load(str(tmp_path)).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_loss_equals_that_of_transformers(model: GPT2LMHeadModel) -> None:
    ids = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        gpt.NextTokenLoss(model)(ids[:, :-1], ids[:, 1:]), model(input_ids=ids, labels=ids).loss
    )


def test_sampling_follows_seed_temperature_top_k_and_top_p(model: GPT2LMHeadModel) -> None:
    # 42 tokens, more than the context of 24.
    drawn = gpt.sample(model, [5, 6], 40, temperature=0.9, top_k=20, seed=3)
    assert drawn == gpt.sample(model, [5, 6], 40, temperature=0.9, top_k=20, seed=3)
    assert drawn != gpt.sample(model, [5, 6], 40, temperature=0.9, top_k=20, seed=4)
    greedy = gpt.sample(model, [5, 6], 10, temperature=0)
    assert gpt.sample(model, [5, 6], 10, temperature=1.0, top_k=1) == greedy
    assert gpt.sample(model, [5, 6], 10, temperature=1.0, top_k=0, top_p=1e-9) == greedy


def test_weight_decay_applies_to_matrices_only(model: GPT2LMHeadModel) -> None:
    decayed, free = gpt.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(
        names[id(p)].endswith("weight") and ".ln_" not in names[id(p)] for p in decayed["params"]
    )
    assert all(names[id(p)].endswith("bias") or ".ln_" in names[id(p)] for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_damaged_pretrained_folder_is_an_error(tmp_path: Path, model: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match=r"has no config.json"):
        gpt.load(str(tmp_path))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"cannot be loaded as a GPT-2"):
        gpt.load(str(tmp_path))


def test_learning_rate_warms_up_holds_and_decays() -> None:
    def rates(**optim: Any) -> list[float]:
        config = loader.load(
            "gpt", None, {"steps": 10, **{f"optim.{key}": value for key, value in optim.items()}}
        )
        assert isinstance(config, GptConfig)
        return [round(learning_rate(config, step), 6) for step in range(10)]

    constant = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    linear = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    held = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates(lr=1.0, warmup_steps=4, schedule="constant") == constant
    assert rates(lr=1.0, warmup_steps=0, schedule="linear") == linear
    assert rates(lr=1.0, warmup_steps=2, schedule="linear", hold=0.5) == held
    assert rates(lr=1.0, warmup_steps=0, schedule="cosine")[5] == 0.5


# ---- training on Ray


@pytest.fixture(scope="module")
def kiln(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a storage with a small corpus."""
    root = tmp_path_factory.mktemp("kiln")
    (root / "corpus.txt").write_text("".join(f"{number}: {VERSE}" for number in range(120)))
    return str(root)


def config_of(root: str, name: str, **values: Any) -> Config:
    return loader.load(
        "gpt",
        "gpt-tiny",
        {
            "run.name": name,
            "data.source": f"{root}/corpus.txt",
            "data.vocab_size": 300,
            "optim.schedule": "constant",
            "log.every": 1,
            "log.eval_every": 100,
            "log.sample_every": 100,
            "checkpoint.keep_last": 10,
            **values,
        },
    )


def run(root: str, name: str, **values: Any) -> Summary:
    return launch.fit(config_of(root, name, **values), root, quiet=True)


def weights(root: str, name: str) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(f"{root}/runs/{name}")
    assert newest is not None
    return load_file(f"{root}/runs/{name}/checkpoints/{newest.folder}/model.safetensors")


def losses(rows: list[records.Row]) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def halved(kiln: str) -> Summary:
    """Train the run "halved" for 4 steps and resume it for 6 more; return its summary."""
    run(kiln, "halved", steps=4, **DROPOUT)
    return run(kiln, "halved", steps=10, **{"run.resume": "must"}, **DROPOUT)


def train_without_ray(rank: int, config: Config, dataset: Dataset, run_uri: str) -> None:
    workers.run(config, dataset, run_uri)


def test_resume_equals_uninterrupted_run_bit_for_bit(kiln: str, halved: Summary) -> None:
    config, uri = (
        config_of(kiln, "uninterrupted", steps=10, **DROPOUT),
        f"{kiln}/runs/uninterrupted",
    )
    workers.spawn(1, train_without_ray, config, workers.prepare(config, kiln), uri)
    assert halved["resumed_from"] == 4
    assert losses(records.metrics(f"{kiln}/runs/halved")) == losses(
        storage.read_json(f"{uri}/rows.json")
    )
    assert all(
        torch.equal(value, weights(kiln, "halved")[name])
        for name, value in weights(kiln, "uninterrupted").items()
    )


def test_run_writes_summary_samples_tensorboard_and_lineage(kiln: str, halved: Summary) -> None:
    uri = f"{kiln}/runs/halved"
    assert storage.read_json(f"{uri}/summary.json") == halved
    assert 0 < halved["metrics"]["heldout_bits_per_byte"] < 10
    assert (Path(uri) / "samples/text_000010.txt").read_text()
    assert list((Path(uri) / "tensorboard").glob("events*"))
    assert storage.read_json(f"{uri}/lineage.json")["dataset"]["fingerprint"] in halved["dataset"]


def test_missing_data_workers_and_cluster_are_one_line_errors(
    kiln: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gpt", "--config", "gpt-tiny", "--data.source", "nowhere.txt", "--storage", kiln]
    assert cli.run(train.main, words) == 2
    missing = capsys.readouterr()
    assert "there are no files at nowhere.txt" in missing.err
    assert "Traceback" not in missing.err + missing.out
    many = ["--parallel.workers", "4096", "--batch.global_size", "4096"]
    alone = command(
        "train", "gpt", "--config", "gpt-tiny", *many, "--storage", kiln, RAY_ADDRESS=""
    )
    assert alone.returncode == 2
    assert "parallel.workers 4096 need 4096 CPUs, and this machine has" in alone.stderr
    assert "Traceback" not in alone.stderr + alone.stdout
    nowhere = command(
        "train", "gpt", "--config", "gpt-tiny", "--storage", kiln, RAY_ADDRESS="127.0.0.1:1"
    )
    assert nowhere.returncode == 2
    assert "no Ray cluster answers at RAY_ADDRESS='127.0.0.1:1'" in nowhere.stderr


def test_wait_for_nodes_is_on_stderr_because_json_has_stdout(
    kiln: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = loader.load("gpt", "gpt-tiny", {"parallel.workers": 64, "batch.global_size": 64})
    launch.check_resources(config, private=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "parallel.workers 64 need 64 CPUs, and the cluster has 4: waiting for nodes to join\n"
    )


def test_complete_run_is_not_trained_again(kiln: str, halved: Summary) -> None:
    assert run(kiln, "halved", steps=10, **DROPOUT) == halved
    # Interrupted between its last checkpoint and its end: it is evaluated, not started over.
    shutil.copytree(f"{kiln}/runs/halved", f"{kiln}/runs/unfinished")
    Path(kiln, "runs", "unfinished", "summary.json").unlink()
    again = run(kiln, "unfinished", steps=10, **DROPOUT)
    assert again["resumed_from"] == 10
    assert again["metrics"]["heldout_loss"] == pytest.approx(halved["metrics"]["heldout_loss"])


def test_run_resumes_only_with_its_own_data(kiln: str, halved: Summary) -> None:
    corpus = Path(kiln, "corpus.txt")
    own = corpus.read_text()
    corpus.write_text(own + VERSE)
    try:
        with pytest.raises(
            ValueError, match=r"run halved was started with data \w+, and data.source now gives"
        ):
            run(kiln, "halved", steps=14, **DROPOUT)
    finally:
        corpus.write_text(own)


def test_config_that_does_not_fit_the_data_is_an_error_before_any_worker_starts(
    kiln: str, model: GPT2LMHeadModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"tokens to train on, and model.context is 9000"):
        run(kiln, "long", **{"model.context": 9000})
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"has 97 tokens and the tokenizer \d+: use the tokenizer it was trained with",
    ):
        run(kiln, "other", **{"model.pretrained": str(tmp_path)})


def test_pretrained_model_in_half_precision_is_trained_in_fp32(
    model: GPT2LMHeadModel, tmp_path: Path
) -> None:
    model.half().save_pretrained(tmp_path)
    model.float()
    config = loader.load(
        "gpt", None, {"model.pretrained": str(tmp_path), "model.dropout": 0.25, "model.context": 24}
    )
    assert isinstance(config, GptConfig)
    built = build(config, Dataset("", {"vocab_size": 97}))
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    assert built.transformer.drop.p == 0.25
    torch.testing.assert_close(
        built.transformer.wte.weight, model.transformer.wte.weight, atol=1e-3, rtol=1e-2
    )


def test_divergence_ends_the_run_with_one_line(kiln: str, command: Any) -> None:
    words = [
        "train",
        "gpt",
        "--config",
        "gpt-tiny",
        "--data.source",
        f"{kiln}/corpus.txt",
        "--data.vocab_size",
        "300",
        "--optim.lr",
        "1e30",
    ]
    failed = command(
        *words,
        "--optim.clip",
        "0",
        "--run.max_failures",
        "0",
        "--run.name",
        "diverging",
        "--storage",
        kiln,
    )
    assert failed.returncode == 1
    assert "training has diverged" in failed.stderr
    assert "Traceback" not in failed.stderr
    report = Path(kiln, "runs", "diverging", "report.md").read_text()
    assert "**It did not reach its 20 steps.** run diverging failed: " in report
    assert "training has diverged" in report


def test_run_folder_that_cannot_be_written_is_a_one_line_error(
    kiln: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is in the place of its samples/ folder."""
    folder = Path(kiln, "runs", "blocked")
    folder.mkdir(parents=True)
    (folder / "samples").touch()
    words = ["gpt", "--config", "gpt-tiny", "--data.source", f"{kiln}/corpus.txt"]
    words += ["--data.vocab_size", "300", "--run.name", "blocked", "--storage", kiln]
    assert cli.run(train.main, words) == 1
    failed = capsys.readouterr().err
    assert f"nothing can be written to {folder}" in failed
    assert "Traceback" not in failed

"""A third kind of model is one object; no other file decides by the kind."""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster import cli, storage
from models.bundle import ModelEntries
from tests.support import workers
from tests.support.paths import ROOT
from train import __main__ as command
from train import launch
from train.config.sections import Config
from train.data.dataset import Dataset
from train.data.order import positions
from train.export import export
from train.kinds import KINDS, Kind
from train.parallel.state import State
from train.run import progress, records
from train.run.panels import Panel
from train.run.recorder import NullRecorder, RunRecorder
from train.run.summary import Summary
from train.run.worker import Worker
from train.verify import compare

# ---- a toy kind


class ToyConfig(Config):
    """The config of a toy."""

    kind: ClassVar[str] = "toy"

    lr: float = 0.1


class Toy:
    """A linear model of three inputs, trained by SGD."""

    name = "toy"
    config = ToyConfig
    best_metric = "heldout_error"
    speed = "samples_per_s"
    progress_metrics = ("heldout_error",)
    weights = ("fp32",)
    panels = (Panel("loss", ("loss",)),)

    def plan(self, config: ToyConfig) -> str:
        return f"a toy, lr {config.lr}"

    def check_environment(self, config: ToyConfig) -> None:
        pass

    def prepare(self, config: ToyConfig, storage_uri: str) -> Dataset:
        uri = storage.join(storage_uri, "data", "toys-0123456789ab")
        return Dataset.write(uri, {"name": "toys", "fingerprint": "0123456789ab", "target": 2.0})

    def check(self, config: ToyConfig, dataset: Dataset) -> None:
        pass

    def prepare_evaluation(self, config: ToyConfig, dataset: Dataset, log: cli.Log) -> Dataset:
        return dataset

    def train(
        self, worker: Worker[ToyConfig], resumed: tuple[int, State] | None
    ) -> dict[str, float]:
        config, strategy, batch = worker.config, worker.strategy, worker.config.batch
        target = torch.full((3, 1), worker.dataset.meta["target"])
        torch.manual_seed(config.run.seed)
        model = nn.Linear(3, 1, bias=False)
        step, saved = resumed or (0, None)
        if saved is not None:
            model.load_state_dict(dict(saved["model"]))
        optimizer = torch.optim.SGD(model.parameters(), config.lr)
        learner = strategy.learner("model", model, optimizer, saved=saved)
        final: dict[str, float] = {}
        while step < config.steps:
            micro_batches = positions(
                step, batch.global_size, config.micro_size, strategy.rank, strategy.world_size
            )
            for number, micro_batch in enumerate(micro_batches):
                inputs = _inputs(micro_batch.tolist())
                with learner.accumulating(number, len(micro_batches)):
                    loss = F.mse_loss(learner(inputs), inputs @ target)
                    learner.backward(loss)
            worker.hooks.gradients_ready(step + 1)
            learner.step()
            step += 1
            if worker.measures_at(step):
                worker.recorder.metrics(step, strategy.mean({"loss": float(loss)}))
            if worker.evaluates_at(step):
                error = (model.weight.detach() - target.T).abs().max()
                final = {"heldout_error": float(error)}
                worker.recorder.metrics(step, final)
                worker.report({"step": step, **final})
            if worker.saves_at(step, worker.evaluates_at(step)):
                worker.checkpoints.save(step, learner.state(), final.get("heldout_error"))
        worker.checkpoints.join()
        strategy.barrier()
        return final

    def export(
        self, config: ToyConfig, state: State, dataset: Dataset, folder: Path, weights: str
    ) -> ModelEntries:
        raise ValueError("a toy cannot be exported")

    def report(self, run_uri: str, metrics: dict[str, float]) -> list[str]:
        return ["## The toy", "", f"Its weights differ by {metrics['heldout_error']:.3f}.", ""]

    def is_headline(self, metric: str) -> bool:
        return metric == "heldout_error"


def _inputs(indices: list[int]) -> Tensor:
    """Return the samples of some positions: (B, 3), a function of the position alone."""
    return torch.stack(
        [torch.randn(3, generator=torch.Generator().manual_seed(index)) for index in indices]
    )


def config_of(name: str, steps: int, resume: str = "never") -> ToyConfig:
    return ToyConfig.model_validate(
        {
            "run": {"name": name, "resume": resume},
            "parallel": {"workers": 2},
            "batch": {"global_size": 8, "micro_size": 2},
            "checkpoint": {"every": 4, "keep_last": 9},
            "log": {"every": 1, "eval_every": 4},
            "steps": steps,
        }
    )


def train(root: str, name: str, steps: int, resume: str = "never") -> Summary:
    return launch.fit(config_of(name, steps, resume), root, quiet=True, kind=Toy())


def train_without_ray(rank: int, root: str) -> None:
    """Train the run "uninterrupted" on one of two workers."""
    config, toy, uri = config_of("uninterrupted", 12), Toy(), f"{root}/runs/uninterrupted"
    recorder = RunRecorder(uri) if rank == 0 else NullRecorder()
    workers.train(config, toy.prepare(config, root), uri, recorder, toy)
    recorder.close()


@pytest.fixture(scope="module")
def root(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a storage with two runs of 12 steps: one uninterrupted and without Ray, one on Ray
    and resumed at step 4."""
    folder = str(tmp_path_factory.mktemp("toys"))
    workers.spawn(2, train_without_ray, folder)
    train(folder, "resumed", 4)
    summary = train(folder, "resumed", 12, resume="must")
    assert (summary["kind"], summary["resumed_from"]) == ("toy", 4)
    return folder


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Kind[ToyConfig]:
    """Add the toy to `KINDS`."""
    monkeypatch.setitem(KINDS, "toy", Toy())
    return KINDS["toy"]


def test_toy_kind_trains_on_two_workers(root: str) -> None:
    rows = records.metrics(f"{root}/runs/uninterrupted")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 10
    errors = [row["heldout_error"] for row in rows if "heldout_error" in row]
    assert len(errors) == 3
    assert errors == sorted(errors, reverse=True)


def test_toy_kind_resumes_bit_for_bit(root: str) -> None:
    uris = f"{root}/runs/uninterrupted", f"{root}/runs/resumed"
    compared = [
        *compare.metrics(*(records.metrics(uri) for uri in uris)),
        *compare.checkpoints(*uris),
    ]
    assert [start["step"] for start in records.starts(uris[1])] == [0, 4]
    # Loss and error of each step, and the weights and progress of three checkpoints.
    assert len(compared) == 12 + 3 + 2 * 3
    assert [item for item in compared if item.difference] == []


def test_terminal_shows_the_metrics_that_the_kind_names(
    ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = progress.Shown(Toy.progress_metrics, Toy.speed)
    row = {"step": 4.0, "loss": 1.5, "heldout_error": 0.25, "samples_per_s": 1200.0}
    with progress.watch("toys", 4, shown) as feed:
        feed.push.remote(row)
    (line,) = capsys.readouterr().out.splitlines()
    *metrics, seconds = line.split("  ")
    assert metrics == ["toys: step 4/4", "heldout_error 0.25", "1,200 samples/s"]
    assert seconds.endswith(" s")


def test_toy_kind_writes_its_own_report_section(root: str) -> None:
    page = Path(root, "runs", "resumed", "report.md").read_text()
    assert "12 steps on 2 worker(s), data toys-0123456789ab" in page
    assert "## The toy\n\nIts weights differ by 0." in page
    assert "Resumed 1 time(s):" in page
    assert Path(root, "runs", "resumed", "curves.png").is_file()


def test_toy_kind_refuses_to_be_exported(root: str, registered: Kind[ToyConfig]) -> None:
    with pytest.raises(ValueError, match="a toy cannot be exported"):
        export("resumed", root)
    with pytest.raises(ValueError, match="--weights int8 is unsupported for run 'resumed', which"):
        export("resumed", root, weights="int8")
    assert not storage.exists(f"{root}/models")


def test_toy_kind_has_a_command(
    registered: Kind[ToyConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["toy", "--lr", "0.25", "--steps", "7", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 0.25" in printed
    assert "plan: 7 steps of 32 samples on 1 CPU worker(s)" in printed
    assert printed.endswith("; a toy, lr 0.25\n")


# ---- no other file decides by the kind

NAMES, CONFIGS = {"gpt", "gan"}, {"GptConfig", "GanConfig"}
# The dicts by kind that serving and bundles may have (modality, sample).
TABLES = {"models/bundle.py": {"SAMPLES"}, "serve/http/routes.py": {"SAMPLE_TYPES", "by_kind"}}


def decisions(source: str, tables: Collection[str] = ()) -> Iterator[int]:
    """Yield the lines at which code decides by the kind: a comparison or a match with its name, an
    isinstance of its config, a dict by its name that is not assigned to a name in `tables`."""
    tree = ast.parse(source)
    allowed = _dicts(tree, tables)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            if any(_names(part) & NAMES for part in [node.left, *node.comparators]):
                yield node.lineno
        elif isinstance(node, ast.MatchValue):
            if _names(node.value) & NAMES:
                yield node.value.lineno
        elif isinstance(node, ast.Dict) and node not in allowed:
            keys = [key for key in node.keys if key is not None]
            if any(_names(key) & NAMES for key in keys):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            classes = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            attributes = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            if node.func.id in {"isinstance", "issubclass"} and (classes | attributes) & CONFIGS:
                yield node.lineno


def _dicts(tree: ast.Module, names: Collection[str]) -> set[ast.Dict]:
    """Return the dicts that are assigned to one of `names`."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id in names
    }


def _names(node: ast.expr) -> set[object]:
    """Return the constants in an expression: those of a tuple, list or set, or its own value."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("if config.kind == 'gpt': pass", True),
        ("if 'gan' != kind: pass", True),
        ("speed = 1 if kind in ('gpt', 'gan') else 2", True),
        ("if isinstance(config, GanConfig): pass", True),
        ("if isinstance(config, gan.GanConfig | None): pass", True),
        ("best = {'gpt': 'loss', 'gan': 'fid'}[kind]", True),
        ("match kind:\n    case 'gpt': pass", True),
        ("if kind == 'toy': pass", False),
        ("name = 'gan'", False),
        ("kind: ClassVar[str] = 'gpt'", False),
        ("for kind in ('gpt', 'gan'): pass", False),
    ],
)
def test_decisions_are_recognized(line: str, found: bool) -> None:
    assert bool(list(decisions(line))) == found


def test_only_a_known_dict_may_list_the_kinds() -> None:
    source = "SAMPLES = {'gpt': 1}\ntypes: dict[str, int] = {'gan': 2}\nother = {'gpt': 3}"
    assert list(decisions(source, {"SAMPLES", "types"})) == [3]
    assert list(decisions(source)) == [1, 2, 3]


def test_no_file_decides_by_the_kind_of_model() -> None:
    packages = ("cluster", "models", "serve", "train", "tune")
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    found = [
        f"{name}:{line}"
        for file in files
        for name in [str(file.relative_to(ROOT))]
        for line in decisions(file.read_text(encoding="utf-8"), TABLES.get(name, ()))
    ]
    assert found == []

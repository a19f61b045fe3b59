"""The GAN's training loop: `python -m train gan --config gan-tiny`."""

import functools
from collections.abc import Callable
from functools import partial

from torch import Tensor

from train.data.images import Images
from train.gan import extractor_file
from train.gan.alarms import Alarm, Alarms
from train.gan.config import GanConfig
from train.gan.evaluator import Evaluator
from train.gan.metrics import BEST
from train.gan.samples import Sampler
from train.gan.trainer import GanTrainer, net_config
from train.parallel.state import Halt, State
from train.run.meter import Meter
from train.run.recorder import Recorder, check_finite
from train.run.worker import Worker


def train(worker: Worker[GanConfig], resumed: tuple[int, State] | None) -> dict[str, float]:
    """Run the training loop on one worker.

    Args:
        worker: this worker.
        resumed: (step, state) of the checkpoint to resume from, or None.

    Returns:
        The run's final metrics, the same on every worker.
    """
    # ---- set up
    config, strategy, recorder = worker.config, worker.strategy, worker.recorder
    dataset = worker.dataset
    images = Images(dataset, "train", config.data.size, config.data.horizontal_flip)
    step, saved = resumed or (0, None)
    trainer = GanTrainer(config, net_config(config, dataset), strategy, saved)
    sampler = Sampler(trainer, images)
    alarms = Alarms(config.gan.objective, saved["alarms"] if saved else None)
    evaluate = _evaluation(worker, trainer, images)

    trainer.warm_up(images)
    meter = Meter("images_per_s", config.gan.critic_steps * config.batch.global_size)
    final: dict[str, float] = {}
    losses: dict[str, Tensor] = {}
    while step < config.steps:
        # ---- critic updates, then one generator update
        while trainer.critic_updates_in_step < config.gan.critic_steps:
            with meter.waiting("data"):
                batches = trainer.critic_batches(trainer.critic_updates, images)
            losses |= trainer.update_critic(batches)
        worker.hooks.gradients_ready(step + 1)
        losses |= trainer.update_generator(trainer.generator_batches(step))
        trainer.average.update(step)
        step += 1
        meter.count()

        # ---- once in a while: log, evaluate, sample, save
        if worker.measures_at(step):
            metrics = strategy.mean({name: float(value) for name, value in losses.items()})
            _record(recorder, alarms.measured(step, metrics))
            recorder.metrics(step, {**check_finite(metrics, step), **meter.read()})
        with meter.paused():
            evaluated: dict[str, float] = {}
            new_alarms: list[Alarm] = []
            if worker.evaluates_at(step):
                with meter.waiting("eval"):
                    evaluated = strategy.from_rank_0(evaluate)
                new_alarms = alarms.evaluated(step, evaluated)
                _record(recorder, new_alarms)
                recorder.metrics(step, check_finite(evaluated, step))
                final = {**evaluated, **metrics}
                worker.report({"step": step, **final, **meter.total()})
            if strategy.rank == 0 and worker.samples_at(step):
                with meter.waiting("sample"):
                    sampler.record(recorder, step)
            _stop_at_collapse(config, new_alarms)
            if worker.saves_at(step, bool(evaluated)):
                recorder.flush()  # a run resumed from here has its curves up to here
                state = trainer.state() | {"alarms": alarms.state()}
                with meter.waiting("checkpoint"):
                    worker.checkpoints.save(step, state, evaluated.get(BEST))
    with meter.waiting("checkpoint"):
        worker.checkpoints.join()
    strategy.barrier()
    # Without final metrics the run was interrupted after its last checkpoint: all steps are done,
    # the evaluation is not.
    return (final or strategy.from_rank_0(evaluate)) | meter.total()


def _evaluation(
    worker: Worker[GanConfig], trainer: GanTrainer, images: Images
) -> Callable[[], dict[str, float]]:
    """Return a function that evaluates the averaged generator; for rank 0."""
    config, device, dataset = worker.config, worker.strategy.device, worker.dataset
    heldout = Images(dataset, "heldout", config.data.size)

    @functools.cache
    def evaluator() -> Evaluator:
        assert dataset.extractor is not None, "prepare_evaluation has added it"
        net = extractor_file.load(dataset.extractor["uri"], device)
        samples, inception = config.quality.samples, config.quality.inception
        return Evaluator(images, heldout, net, samples, device, inception)

    return lambda: evaluator()(partial(trainer.generate_like, images))


def _record(recorder: Recorder, alarms: list[Alarm]) -> None:
    for alarm in alarms:
        recorder.alarm(alarm.step, alarm.kind, alarm.message)


def _stop_at_collapse(config: GanConfig, alarms: list[Alarm]) -> None:
    """Stop the run, where gan.on_collapse says so, after everything is recorded.

    Raises:
        Halt: the generator has collapsed.
    """
    for alarm in alarms:
        if alarm.kind == "collapse" and config.gan.on_collapse == "stop":
            raise Halt(f"collapse at step {alarm.step} (gan.on_collapse is stop): {alarm.message}")

"""`peft-vit train`: image sizes, one training, and what folds say of it; the better of it and of a linear probe.

What was not said is chosen after images and time. Each call is a study of one run in a folder of its own, where the
same call continues.
"""

from __future__ import annotations

from peft_vit.core.config import named_as_typed
from peft_vit.fit import stages
from peft_vit.fit.calls import RequestFile, TrainRun, call_folder, earlier_call, write_request
from peft_vit.fit.decide import temperature_before, worth_training
from peft_vit.fit.earlier import EarlierRun
from peft_vit.fit.events import Emit, print_event
from peft_vit.fit.fit import Environment, Fit
from peft_vit.fit.intake import named_files, refuse_among_images
from peft_vit.fit.outcomes import EveryRunFailedError, Outcome, meaning_on, pooled, with_meaning
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.request import TrainRequest
from peft_vit.runs.records.storage import RECORD_FILE, link_latest, read_record, write_record


def train(request: TrainRequest, emit: Emit = print_event, environment: Environment | None = None) -> TrainRun:
    """Do one run on somebody's own images, in a folder of its own; the same call continues in its folder.

    Returns:
        The call, whose run is done or has failed.

    Raises:
        UserError: before anything is trained, for anything that would fail later; later if there is no room for a
            result.
        KeyboardInterrupt: after Ctrl-C; the same request continues.
    """
    refuse_among_images(request.images, request.output)
    earlier = None if request.from_run is None else EarlierRun.read(request.from_run)
    request = request if earlier is None else earlier.taken_over(request)
    fit = Fit(request, emit, environment or Environment())
    with named_as_typed(TrainRequest), fit.opened:
        files = named_files(request)
        with fit.stage("look"):
            stages.look(fit)
        asked = RequestFile.of(request, fit.images.index, files)
        run, changes = earlier_call(asked)
        if run is not None and run.is_done:
            link_latest(run.folder)
            fit.tell(f"This call was done before, in {run.folder}. Another setting, such as --seed 1, makes a new run.")
            return run
        if changes:
            fit.tell(changes)
        with call_folder(request.output, request.label, None if run is None else run.folder) as lock:
            run = TrainRun(lock.folder, asked)
            fit.enter(lock.folder, lock)
            where = f"from step {run.step} in" if run.step else "in"
            fit.tell(f"{'Continues' if fit.begun else 'Starts'} {where} {run.folder}")
            if earlier is not None:
                fit.decisions.flips = earlier.record.spec.experiment.training.flips
            _carry_out(fit, run)
            if earlier is not None and run.is_done:
                fit.tell(earlier.change_to(run))
        return run


def _carry_out(fit: Fit, run: TrainRun) -> None:
    """Do what is not done: image sizes, the training, folds, and a linear probe if it is better."""
    begun = fit.begun
    try:
        write_request(run.folder, run.asked)
        stages.keep_images(fit)
        fit.begun = True
        allowed = stages.allowed_sizes(fit)
        with fit.stage("sizes"):
            sizes = stages.with_lengths(fit, stages.try_sizes(fit, allowed))
        recipe, longer = stages.choose_first(fit, sizes)
    except BaseException:
        if not begun:  # refused, or interrupted before anything is trained: nothing of it stays
            run.forget(fit.file_path, fit.images.file)
        raise
    fit.load_earlier()
    try:
        with fit.stage("first"):
            outcome, _ = stages.train_last(fit, recipe, longer)
    except EveryRunFailedError:  # its record says why
        return
    known = recipe
    if fit.request.validates and not (fit.num_validation or fit.request.smoke or fit.images.shots < 2):
        probe = stages.best_linear_probe(fit, sizes)
        beside = recipe if probe.score is None else probe.probe
        with fit.stage("folds"):
            known = stages.know_by_folds(fit, recipe, beside, fit.until(-fit.over_s))
        last = fit.costs.last_steps(recipe, longer)
        if not recipe.is_probe and beside.is_probe and not worth_training(fit, known, last, beside):
            with fit.stage("final"):
                recipe, known, longer = beside, beside, 1.0
                outcome, _ = stages.train_last(fit, recipe, longer)
    _deliver(fit, run, recipe, known, outcome, longer)


def _deliver(fit: Fit, run: TrainRun, recipe: Recipe, known: Recipe, outcome: Outcome, longer: float) -> None:
    """Write into the record of a run what its outputs mean, as folds of `known` tell, and say that it is the model."""
    folds = [own for _, own in sorted(fit.frame.rows.get(known, {}).items())]
    record = read_record(outcome.folder / RECORD_FILE)
    validated = record.decision or record.calibrated
    usual = None if validated else temperature_before(fit, recipe, known, longer)
    if (meaning := meaning_on(folds, outcome.learned, usual)) is not None:
        results_dir = fit.results_dir(outcome.folder.parts[-3])
        record = with_meaning(record, meaning, folds, outcome.learned)
        if folds:
            on_folds = outcome.learned.predictions(*pooled(folds, outcome.learned), decision=record.decision)
            record = record.model_copy(update={"on_folds": on_folds})
        write_record(results_dir, record)
    if outcome.folder.parents[1] != run.folder:
        fit.tell(f"The model is the linear probe at {recipe.image_size} px.")
        run.deliver(outcome.folder)
    fit.decisions.delivered = recipe, fit.longest_done(recipe)
    fit.save()
    link_latest(run.folder)

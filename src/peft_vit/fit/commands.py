"""What the commands that run studies do: read all files, take all locks, plan everything, then drive study by study."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.base.console import OnProgress, duration, print_lines, progress
from peft_vit.core.config import named_as_typed
from peft_vit.fit.request import TrainRequest
from peft_vit.fit.train_runs import (
    REQUEST_FILE,
    SIZES_FILE,
    RequestFile,
    SizesFile,
    TrainRun,
    call_folder,
    earlier_call,
    write_request,
    write_sizes,
)
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.storage import (
    RECORD_FILE,
    link_latest,
    read_record,
    read_study_file,
    run_folder,
    single_run,
    write_record,
)
from peft_vit.runs.scheduling.carry_out import carry_out

if TYPE_CHECKING:  # what plans and drives is loaded with the locks held: whoever comes too late leaves before torch
    from peft_vit.core.records import RunRecord
    from peft_vit.fit.outcomes import ByFolds
    from peft_vit.fit.own_images import OwnImages
    from peft_vit.runs.scheduling.plan import Plan

_log = partial(print, flush=True)
IMAGES_FILE = "images.json"  # which images a `train` uses


def train_on_own_images(request: TrainRequest) -> TrainRun:
    """Do one run on somebody's own images, in a folder of its own; the same call continues in its folder.

    Returns:
        The call, whose run is done or has failed.

    Raises:
        UserError, KeyboardInterrupt: as `run_studies`.
    """
    _log(f"Reading the images in {request.images}.")  # before torch is loaded, which takes seconds
    from peft_vit.fit.own_images import count_images, named_files, open_images, refuse_among_images
    from peft_vit.runs.scheduling.display import plan_notes

    refuse_among_images(request.images, request.output)
    with named_as_typed(TrainRequest), ExitStack() as stack:
        files = named_files(request)
        with progress("reading images") as on_progress:
            images = stack.enter_context(open_images(request, on_progress))
        print_lines(images.lines)
        index = images.index
        asked = RequestFile.of(request, index, files)
        run, changes = earlier_call(asked)
        if run is not None and run.status().state == "done" and not run.folds_left() and run.size_left() is None:
            link_latest(run.folder)
            _log(f"This call was done before, in {run.folder}. Another setting, such as --seed 1, makes a new run.")
            return run
        counts = count_images(request, index)
        several = index.task.images_of(len(index.labels), index.class_names)
        validated = f"{counts.validation} to validate, " if counts.validation else ""
        shares = f"{counts.train} to train, {validated}{counts.test} to test."
        print_lines(filter(None, [f"{several}: {shares}", changes]))
        folder = None if run is None else run.folder
        with call_folder(request.output, request.label, folder) as lock:
            run = TrainRun(lock.folder, asked)
            file = lock.folder.absolute() / IMAGES_FILE
            if run.status().state != "done":
                with progress("getting ready") as on_progress:
                    plan, chosen = _plan_call(run, request, images, file, on_progress)
                link_latest(run.folder)
                about = f"it takes about {duration(plan.runs[0].estimate.seconds)} in all."
                start = f"Continues from step {run.step} of {plan.runs[0].total_steps}" if run.step else "Starts"
                print_lines(filter(None, [chosen, *plan_notes(plan)]))
                print_lines([f"{start} in {run.folder}; {about}"])
                carry_out(plan, lock, alone=True)
            else:
                images.write(file)
                link_latest(run.folder)
                _log(f"Training is done in {run.folder}; the rest measures how good it is.")
            if run.folds_left():
                _by_folds(run, request, images, file)
            if (size := run.size_left()) is not None:
                _beside(run, request, images, file, size)
        return run


def _plan_call(
    run: TrainRun, request: TrainRequest, images: OwnImages, file: Path, on_progress: OnProgress
) -> tuple[Plan, str]:
    """Plan the run of a call, and choose what was not said; nothing of it stays if that fails.

    What was asked for is written first: if the process is killed meanwhile, the same call continues in its folder.

    Returns:
        The plan, and a line on what was chosen.
    """
    from peft_vit.fit.own_images import regressions, study_of, with_weights
    from peft_vit.runs.scheduling.plan import plan_study
    from peft_vit.runs.scheduling.profiling import measure_step

    begun, chosen = read_study_file(run.folder), ""
    with ExitStack() as undo:
        if begun is None:
            for written in (file, run.folder / REQUEST_FILE, run.folder / SIZES_FILE):
                undo.callback(written.unlink, missing_ok=True)
            write_request(run.folder, run.asked)
        images.write(file)  # a call that goes on leaves out as well what is new and can't be read
        if begun is None or request.smoke:  # whose file holds the compressed one
            request, weights = with_weights(request)
            if weights:
                _log(weights)
            started = time.monotonic()
            trials = regressions(request, images, file, _log, on_progress)
            spent_s = time.monotonic() - started
            study, chosen = study_of(request, run.folder.name, images, file, trials, spent_s)
            if trials:
                columns = ("value", "signed", "l2")
                values, signed, l2 = ({own.image_size: getattr(own, name) for own in trials} for name in columns)
                known = {"seconds": spent_s, "images": trials[0].images}
                write_sizes(run.folder, SizesFile(values=values, signed=signed, l2=l2, **known))
        else:
            study = begun.configuration
        plan = plan_study(
            study, request.output, file=None, smoke=request.smoke, measure_step=partial(measure_step, log=_log)
        )
        if not request.smoke:
            images.keep_pixels(plan.study)
        undo.pop_all()
    return plan, chosen


def _by_folds(run: TrainRun, request: TrainRequest, images: OwnImages, file: Path) -> None:
    """Find by trainings on folds how far a call's model can be believed, and whether a regression is better."""
    from peft_vit.core.tasks import metric_of

    record = run.record()
    assert record is not None
    size, sizes = record.spec.data.image_size, run.sizes() or SizesFile(values={})
    known = _tell_by_folds(run.folder, run.folder.parent, record, request, images, file)
    signed = sizes.signed if known.of_probe is None else {**sizes.signed, size: known.of_probe}
    metric = metric_of(record.spec)
    its = {"the model": known.value, **{f"a regression at {at} px": signed[at] for at in sorted(signed)}}
    said = ", ".join(f"{name} {metric.text(metric.sign * value)}" for name, value in its.items())
    print_lines([f"On images that are left out of training in turn: {said}."])
    write_sizes(run.folder, sizes.model_copy(update={"signed": signed, "trained": known.value, "upper": known.upper}))


def _tell_by_folds(
    folder: Path, results_dir: Path, record: RunRecord, request: TrainRequest, images: OwnImages, file: Path
) -> ByFolds:
    """Train like a run without a fold of its images each, and write into its record how far it can be believed."""
    from peft_vit.fit.outcomes import known_by_folds
    from peft_vit.fit.own_images import fold_study
    from peft_vit.runs.scheduling.plan import plan_study

    request = request.model_copy(update={"weights": request.weights or record.spec.backbone.weights})
    study = fold_study(request, images, file, record)
    images.keep_pixels(study)
    with study_lock(folder / study.name) as lock:
        plan = plan_study(study, folder, file=None)
        if plan.pending:
            about = duration(sum(planned.estimate.seconds for planned in plan.pending))
            how = f"{len(study.seeds)} trainings, each without a part of them, measure how good it is"
            print_lines([f"The images are too few to set some aside for validation: {how}; about {about}."])
            carry_out(plan, lock)
    known = known_by_folds(record, plan, folder)
    write_record(results_dir, known.record)
    return known


def _beside(run: TrainRun, request: TrainRequest, images: OwnImages, file: Path, image_size: int) -> None:
    """Make a regression on frozen features of another size, and deliver it if it is clearly better on validation."""
    from peft_vit.core.backbones import describe
    from peft_vit.core.tasks import metric_of
    from peft_vit.data import make_splits
    from peft_vit.fit.image_sizes import gain_over
    from peft_vit.fit.own_images import regression_at
    from peft_vit.runs.scheduling.plan import plan_study

    trained = run.record()
    assert trained is not None
    request = request.model_copy(update={"weights": request.weights or trained.spec.backbone.weights})
    name = f"{run.folder.name[:46]}-regression-{image_size}px"  # a study's name has at most 64 letters
    sizes = run.sizes()
    assert sizes is not None
    begun = read_study_file(run.folder / name)
    if begun is None:
        l2, compute = sizes.l2.get(image_size), trained.spec.experiment.training.decided_compute
        study = regression_at(request, name, images, file, image_size, compute, l2)
    else:  # the machine may have another pace now, which says how many images test
        study = begun.configuration
    images.keep_pixels(study)
    with study_lock(run.folder / study.name) as lock:
        plan = plan_study(study, run.folder, file=None)
        if plan.pending:
            forecast = images.forecast
            tested = forecast.test_line(describe(forecast.backbone, image_size))
            print_lines([f"A regression at {image_size} px may be better; making it.{tested}"])
            carry_out(plan, lock, alone=True)
    folder = run_folder(run.folder, plan.runs[0].spec)
    regression, metric = read_record(folder / RECORD_FILE), metric_of(trained.spec)
    delivered = single_run(run.folder)
    own, steps, counts = trained.spec.data.image_size, trained.chosen_step or 0, images.forecast.counts
    told_by = sizes.images or counts.train + counts.validation
    expected = gain_over(sizes.values, image_size, own, steps, told_by, images.side)
    validation = images.index.labels[make_splits(images.index, trained.spec.data, trained.spec.seed).validation]
    alike = metric.images_alike(validation)
    if regression.status != "done":
        pass
    elif trained.validation is None or regression.validation is None:  # folds have told that it is better
        _tell_by_folds(run.folder / study.name, run.folder, regression, request, images, file)
        _log(f"The model is the regression at {image_size} px.")
        delivered = folder
    elif not metric.worth(trained.validation, before=regression.validation, expected=expected, images=alike):
        before, after = (metric.text(metric.of(own)) for own in (trained.validation, regression.validation))
        _log(
            f"The model is the regression at {image_size} px: {after} on validation images, and training had {before}."
        )
        delivered = folder
    run.deliver(delivered)

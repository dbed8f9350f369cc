"""RunSpec is what was asked, RunRecord is what happened. Plain values, read and written without torch.

A results directory holds one study per folder::

    DIR/<study>/study.json                                 `schema.StudyFile`: what was planned
    DIR/<study>/<experiment>/seed_<k>/progress.json        `progress.Attempt`, until the run is done
    DIR/<study>/<experiment>/seed_<k>/record.json          `schema.RunRecord`
    DIR/<study>/<experiment>/seed_<k>/adapter.safetensors  what was trained: adapter and head
    DIR/<study>/<experiment>/seed_<k>/features.safetensors  of training images, with measures.features
"""

from peft_vit.records.progress import StudyStatus
from peft_vit.records.run_rows import RUN_COLUMNS, as_csv, history_rows, outcome_digest, run_row
from peft_vit.records.scan import Contents, Problem, read_contents, read_records
from peft_vit.records.schema import (
    FEWEST_HELD_OUT,
    AdapterRemoval,
    BenchRow,
    BitAllocation,
    BitsEntry,
    ByteCounts,
    Calibrated,
    Decision,
    Evaluation,
    Failure,
    FisherCheck,
    FloatPart,
    HeadFit,
    ImportanceEntry,
    LayerSize,
    Metrics,
    ModelSize,
    ParameterCounts,
    Predictions,
    ProbeEntry,
    ProbeTest,
    Provenance,
    QuantizationSummary,
    RankEntry,
    Registration,
    Role,
    RunRecord,
    RunSpec,
    SiteInfo,
    StepRow,
    StudyFile,
    TestedCalibration,
    Unlike,
)
from peft_vit.records.storage import (
    ADAPTER_FILE,
    DELIVERED_FILE,
    FEATURES_FILE,
    FOLDS_STUDY,
    HTML_FILE,
    LATEST,
    RECORD_FILE,
    STUDY_FILE,
    checkpoint_folders,
    delivered_run,
    flush,
    followed,
    link_latest,
    make_folder,
    read_bench,
    read_record,
    read_study_file,
    run_folder,
    single_run,
    write_atomically,
    write_record,
    write_result,
    write_study_file,
    write_whole,
)

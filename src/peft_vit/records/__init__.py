"""RunSpec is what was asked, RunRecord is what happened. Plain values, read and written without torch.

A results directory holds one study per folder::

    DIR/<study>/study.json                                 `study_file.StudyFile`: what was planned
    DIR/<study>/<experiment>/seed_<k>/progress.json        `progress.Attempt`, until the run is done
    DIR/<study>/<experiment>/seed_<k>/record.json          `values.RunRecord`
    DIR/<study>/<experiment>/seed_<k>/adapter.safetensors  what was trained: adapter and head
"""

from peft_vit.records.bench_rows import BenchRow, read_bench
from peft_vit.records.contents import (
    HTML_FILE,
    MARKDOWN_FILE,
    Contents,
    Problem,
    StudyFolder,
    read_contents,
    read_records,
)
from peft_vit.records.derived import RUN_COLUMNS, as_csv, history_rows, outcome_digest, run_row
from peft_vit.records.files import (
    ADAPTER_FILE,
    RECORD_FILE,
    REGISTRATION_FILE,
    checkpoint_folders,
    flush,
    make_folder,
    read_record,
    run_folder,
    write_atomically,
    write_record,
    write_result,
    write_whole,
)
from peft_vit.records.run_spec import RunSpec
from peft_vit.records.values import (
    AdapterRemoval,
    BitAllocation,
    BitsEntry,
    ByteCounts,
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
    Provenance,
    QuantizationSummary,
    RankEntry,
    Registration,
    Role,
    RunRecord,
    SiteInfo,
    StepRow,
)

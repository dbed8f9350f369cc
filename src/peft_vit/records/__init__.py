"""RunSpec is what was asked, RunRecord is what happened. Plain values, read and written without torch.

A results directory holds one study per folder::

    DIR/<study>/study.json, ledger.jsonl                   what was planned, what happened
    DIR/<study>/<experiment>/seed_<k>/record.json          `values.RunRecord`
    DIR/<study>/<experiment>/seed_<k>/adapter.safetensors  what was trained: adapter and head
"""

from peft_vit.records.contents import (
    HTML_FILE,
    MARKDOWN_FILE,
    Contents,
    Problem,
    StudyFolder,
    read_contents,
    read_records,
)
from peft_vit.records.files import (
    ADAPTER_FILE,
    RECORD_FILE,
    checkpoint_folders,
    flush,
    make_folder,
    read_record,
    run_folder,
    write_atomically,
    write_record,
    write_result,
)
from peft_vit.records.history import history_rows
from peft_vit.records.outcome import outcome_digest
from peft_vit.records.values import (
    SCHEMA_VERSION,
    AdapterRemoval,
    BitAllocation,
    BitsEntry,
    ByteCounts,
    Evaluation,
    Failure,
    FisherCheck,
    FloatPart,
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
    RunRecord,
    RunSpec,
    SiteInfo,
    StepRow,
)

__all__ = [
    "ADAPTER_FILE",
    "HTML_FILE",
    "MARKDOWN_FILE",
    "RECORD_FILE",
    "SCHEMA_VERSION",
    "AdapterRemoval",
    "BitAllocation",
    "BitsEntry",
    "ByteCounts",
    "Contents",
    "Evaluation",
    "Failure",
    "FisherCheck",
    "FloatPart",
    "ImportanceEntry",
    "LayerSize",
    "Metrics",
    "ModelSize",
    "ParameterCounts",
    "Predictions",
    "ProbeEntry",
    "Problem",
    "Provenance",
    "QuantizationSummary",
    "RankEntry",
    "Registration",
    "RunRecord",
    "RunSpec",
    "SiteInfo",
    "StepRow",
    "StudyFolder",
    "checkpoint_folders",
    "flush",
    "history_rows",
    "make_folder",
    "outcome_digest",
    "read_contents",
    "read_record",
    "read_records",
    "run_folder",
    "write_atomically",
    "write_record",
    "write_result",
]
